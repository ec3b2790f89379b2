// The API as this page calls it.

// A server that is silent for so long does not answer.
const LONGEST_MS = 8000;
const KEY = "fairshard-token";
let token = sessionStorage.getItem(KEY) || "";

export function useToken(value) {
  token = value;
  sessionStorage.setItem(KEY, value);
}

/** An answer that is no success; `code` and `status` as the API gives them. */
export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers(more = {}) {
  return {Accept: "application/json", ...(token ? {Authorization: `Bearer ${token}`} : {}), ...more};
}

async function failure(response) {
  const found = await response.json().catch(() => ({}));
  return new ApiError(found.error || `The server answered ${response.status}.`, response.status, found.code);
}

/** The JSON of an answer; ApiError where it is none of success, unless `refused` says that its JSON is wanted too. */
export async function call(method, path, {body, more, refused} = {}) {
  const sent = body === undefined ? {} : {"Content-Type": "application/json"};
  let response;
  try {
    response = await fetch(path, {method, headers: headers({...sent, ...more}), body: body === undefined ? undefined : JSON.stringify(body),
      signal: method === "GET" ? AbortSignal.timeout(LONGEST_MS) : undefined});
  } catch {
    throw new ApiError("The server does not answer.", 0, "away");
  }
  if (!response.ok && !refused) throw await failure(response);
  return response.json();
}

/**
 * Read a job's events until it ends or `signal` aborts. fetch and not EventSource, which cannot send a token.
 * Comes back where it was; throws what stops it for good.
 */
export async function events(jobId, onEvent, signal) {
  let last = "";
  for (;;) {
    const response = await fetch(`/api/jobs/${jobId}/events`, {
      headers: headers({Accept: "text/event-stream", ...(last ? {"Last-Event-ID": last} : {})}), signal,
    });
    if (response.status === 204) return;
    if (!response.ok) throw await failure(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = Object.fromEntries(block.split("\n").filter((line) => !line.startsWith(":")).map((line) => line.split(/: (.*)/s)));
        if (fields.id) last = fields.id;
        if (fields.event) onEvent(fields.event, JSON.parse(fields.data || "{}"));
        if (fields.event === "ended") return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}
