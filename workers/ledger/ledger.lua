-- The ledger's transitions; the states are drawn in ledger.py. One script, so that one SHA serves all of them.
-- KEYS[1] key prefix; ARGV[1] operation; ARGV[2...] its arguments. Times are milliseconds of this server's clock.
-- Redis 6.2 is the floor: no functions, no newer commands.
local P, op = KEYS[1], ARGV[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local FIRST_RESEND_MS, LAST_RESEND_MS, EVENTS_KEPT = 5000, 600000, 1000
-- That a job ended is known for so long at least, however soon the rest of it goes: a journal that was not looked into
-- meanwhile would take it for lost, and submit it again.
local OVER_MS = 30 * 86400000
local wakes = {}

local function job_key(job) return P .. 'job:' .. job end
local function step_key(job, step) return P .. 'step:' .. job .. ':' .. step end
local function words(text)
  local list = {}
  for word in string.gmatch(text or '', '%S+') do list[#list + 1] = word end
  return list
end
local function get(key, field) return redis.call('HGET', key, field) or nil end
local function number(key, field) return tonumber(redis.call('HGET', key, field) or 0) end
local function present(value) return value and value ~= '' end
local function count(name) redis.call('HINCRBY', P .. 'counters', name, 1) end
local function event(job, ...)
  redis.call('XADD', P .. 'events:' .. job, 'MAXLEN', '~', EVENTS_KEPT, '*', 'at', string.format('%d', now), ...)
end
-- How long the step that is done ran: a count by the least bound that it kept, and the sum. Bounds as in ledger.py.
local STEP_BOUNDS_S = {'0.1', '0.5', '2', '10', '60', '300', '1800', '7200'}
local function took(step, begun)
  local ms, kind, within = math.max(0, now - begun), string.match(step, '^[^:]+'), '+Inf'
  for _, bound in ipairs(STEP_BOUNDS_S) do
    if ms <= 1000 * tonumber(bound) then within = bound break end
  end
  redis.call('HINCRBY', P .. 'counters:step_seconds', kind .. ' ' .. within, 1)
  redis.call('HINCRBY', P .. 'counters:step_seconds', kind .. ' ms', ms)
end
local EVICTED = cjson.encode({code = 'unavailable', details = {evicted = true},
  message = 'Redis dropped a part of this job to free memory: its maxmemory-policy evicts; set it to noeviction ' ..
    '(redis-cli CONFIG SET maxmemory-policy noeviction), and submit the job again'})
local OPEN = {waiting = true, queued = true, running = true}
local ENDED = {done = true, failed = true, cancelled = true}

-- `delay` 0: the caller sends the message now, the reconciler only if nobody claims. Else the reconciler sends it.
local function make_due(job, step, delay)
  local key = step_key(job, step)
  redis.call('HDEL', P .. 'running', job .. '|' .. step)
  redis.call('HSET', key, 'state', 'queued', 'sends', delay > 0 and 0 or 1, 'not_before', now + delay)
  redis.call('ZADD', P .. 'due', now + (delay > 0 and delay or FIRST_RESEND_MS), job .. '|' .. step)
  if delay == 0 then
    local found = redis.call('HMGET', key, 'task', 'queue')
    wakes[#wakes + 1] = {job, step, found[1], found[2], get(job_key(job), 'model_name') or ''}
  end
end

local function close_step(job, step, state, err)
  local key = step_key(job, step)
  local was = redis.call('HMGET', key, 'state', 'node_id', 'started_at')
  if not OPEN[was[1]] then return false end
  if state == 'done' and was[3] then took(step, tonumber(was[3])) end
  redis.call('HSET', key, 'state', state, 'ended_at', now)
  if present(err) then redis.call('HSET', key, 'error', err) end
  redis.call('ZREM', P .. 'due', job .. '|' .. step)
  redis.call('HDEL', P .. 'running', job .. '|' .. step)
  if present(was[2]) then
    redis.call('SREM', P .. 'at:' .. was[2], job .. '|' .. step)
    if redis.call('EXISTS', P .. 'at:' .. was[2]) == 0 then redis.call('SREM', P .. 'nodes_in_use', was[2]) end
  end
  redis.call('HINCRBY', job_key(job), 'open', -1)
  count('steps_' .. state .. '_total')
  event(job, 'event', 'step', 'step', step, 'state', state, 'error', err or '')
  return true
end

local end_job
local function release(job)
  redis.call('HSET', job_key(job), 'held', '')
  for _, step in ipairs(words(get(job_key(job), 'steps'))) do
    local key = step_key(job, step)
    if get(key, 'state') == 'waiting' and number(key, 'pending') == 0 then make_due(job, step, 0) end
  end
end

end_job = function(job, state, err)
  local key = job_key(job)
  local found = redis.call('HMGET', key, 'state', 'flight', 'model_name', 'submitter', 'ttl', 'steps', 'waits_for')
  if ENDED[found[1]] then return false end
  for _, step in ipairs(words(found[6])) do close_step(job, step, 'cancelled', '') end
  redis.call('HSET', key, 'state', state, 'ended_at', now)
  if present(err) then redis.call('HSET', key, 'error', err) end
  if present(found[2]) and get(P .. 'flight', found[2]) == job then redis.call('HDEL', P .. 'flight', found[2]) end
  redis.call('ZREM', P .. 'unfinished', job)
  redis.call('ZADD', P .. 'jobs:' .. state, redis.call('ZSCORE', P .. 'jobs', job) or now, job)
  redis.call('ZREM', P .. 'requests:' .. (found[3] or ''), job)
  if present(found[4]) and redis.call('HINCRBY', P .. 'submitters', found[4], -1) <= 0 then
    redis.call('HDEL', P .. 'submitters', found[4])
  end
  if present(found[7]) then redis.call('SREM', P .. 'waiters:' .. found[7], job) end
  redis.call('DEL', P .. 'token:' .. job, P .. 'payload:' .. job .. ':profile')
  count('jobs_' .. state .. '_total')
  event(job, 'event', 'ended', 'state', state, 'error', err or '')
  local ttl = tonumber(found[5] or OVER_MS)
  redis.call('ZADD', P .. 'ended', now + ttl, job)
  redis.call('SET', P .. 'over:' .. job, state, 'PX', string.format('%d', math.max(ttl, OVER_MS)))
  redis.call('PEXPIRE', key, ttl)
  redis.call('PEXPIRE', P .. 'events:' .. job, ttl)
  for _, step in ipairs(words(found[6])) do redis.call('PEXPIRE', step_key(job, step), ttl) end
  local waiters = redis.call('SMEMBERS', P .. 'waiters:' .. job)
  redis.call('DEL', P .. 'waiters:' .. job)
  table.sort(waiters)
  for _, waiter in ipairs(waiters) do
    if state == 'done' then
      release(waiter)
    else
      local cause = present(err) and cjson.decode(err) or {}
      end_job(waiter, 'failed', cjson.encode({
        code = cause.code or 'conflict',
        message = 'the request that this waited for (job ' .. job .. ') was ' .. state ..
          (cause.message and ': ' .. cause.message or ''),
        details = {waited_for = job}}))
    end
  end
  return true
end

-- A step that exists already is started over (the plan changed); whoever still runs it is fenced.
local function put_step(job, spec)
  local key = step_key(job, spec.name)
  local was = get(key, 'state')
  if not OPEN[was] then redis.call('HINCRBY', job_key(job), 'open', 1) end
  redis.call('HSET', key, 'state', 'waiting', 'task', spec.task, 'queue', spec.queue, 'node_id', spec.node_id or '',
    'args', spec.args or '', 'next', '', 'pending', #spec.after, 'attempts', 0, 'max', spec.max_attempts)
  redis.call('HDEL', key, 'error', 'progress', 'result', 'started_at', 'ended_at', 'task_id')
  redis.call('HINCRBY', key, 'fence', was and 1 or 0)
  redis.call('ZREM', P .. 'due', job .. '|' .. spec.name)
  redis.call('HDEL', P .. 'running', job .. '|' .. spec.name)
  if present(spec.node_id) then
    redis.call('SADD', P .. 'at:' .. spec.node_id, job .. '|' .. spec.name)
    redis.call('SADD', P .. 'nodes_in_use', spec.node_id)
  end
  count('steps_total')
end

local function put_steps(job, specs)
  -- In the order in which they will run: those that are started over come after what was before them.
  local names, given = {}, {}
  for _, spec in ipairs(specs) do given[spec.name] = true end
  for _, name in ipairs(words(get(job_key(job), 'steps'))) do
    if not given[name] then names[#names + 1] = name end
  end
  for _, spec in ipairs(specs) do
    names[#names + 1] = spec.name
    put_step(job, spec)
  end
  for _, spec in ipairs(specs) do
    for _, before in ipairs(spec.after) do
      local key = step_key(job, before)
      if get(key, 'state') == 'done' then
        redis.call('HINCRBY', step_key(job, spec.name), 'pending', -1)
      else
        redis.call('HSET', key, 'next', (get(key, 'next') or '') .. ' ' .. spec.name)
      end
    end
  end
  redis.call('HSET', job_key(job), 'steps', table.concat(names, ' '))
  for _, spec in ipairs(specs) do
    if number(step_key(job, spec.name), 'pending') == 0 and not present(get(job_key(job), 'held')) then
      make_due(job, spec.name, 0)
    end
  end
end

-- Whether Redis has all of an unfinished job; one that it dropped a part of ends here, as failed.
local function whole(job)
  local found, all = redis.call('HMGET', job_key(job), 'kind', 'params', 'steps', 'ttl'), true
  for _, value in ipairs(found) do all = all and value end
  for _, step in ipairs(words(found[3])) do all = all and get(step_key(job, step), 'task') end
  if not all then end_job(job, 'failed', EVICTED) end
  return all
end

-- Whether (job, step, fence) may still write: 'ok', or why not.
local function standing(job, step, fence)
  local state = get(job_key(job), 'state')
  if not state then return 'unknown' end
  if state == 'cancelled' then return 'cancelled' end
  local found = redis.call('HMGET', step_key(job, step), 'state', 'fence')
  if found[2] ~= fence or ENDED[state] and found[1] ~= 'done' then return 'fenced' end
  if found[1] == 'running' then return 'ok' end
  return found[1] == 'done' and 'done' or 'fenced'
end

local function answer(...)
  local list = {...}
  list[#list + 1] = wakes
  return list
end

local function vanished(step, found, max)
  return cjson.encode({code = 'worker_lost', details = {step = step, owner = found, attempts = max},
    message = 'step ' .. step .. ' was given up after ' .. max .. ' attempts: its worker (last ' .. (found or 'unknown') ..
      ') vanished each time; it may need more memory than the machine has, or than FAIRSHARD_STEP_MEMORY_BYTES lets it take'})
end

-- The job fails, and shows the step that it failed of, whichever was claimed last.
local function give_up(job, step, err)
  close_step(job, step, 'failed', err)
  redis.call('HSET', job_key(job), 'step', step)
  end_job(job, 'failed', err)
end

local function lose(job, step, node, err)
  local key = job_key(job)
  local policy = get(key, 'on_node_loss')
  if policy == 'wait' then return false end
  if policy == 'skip' then
    for _, following in ipairs(words(get(step_key(job, step), 'next'))) do
      if redis.call('HINCRBY', step_key(job, following), 'pending', -1) == 0 then make_due(job, following, 0) end
    end
    close_step(job, step, 'lost', err)
    if number(key, 'open') == 0 then end_job(job, 'done', '') end
    return true
  end
  if not close_step(job, step, 'lost', err) then return false end
  redis.call('HSET', key, 'lost', (get(key, 'lost') or '') .. ' ' .. node)
  event(job, 'event', 'lost', 'step', step, 'node_id', node, 'error', err)
  count('nodes_lost_total')
  local plan = step_key(job, 'plan')
  if get(plan, 'state') == 'done' then
    redis.call('HINCRBY', key, 'open', 1)
    redis.call('HSET', plan, 'attempts', 0)
    redis.call('HDEL', plan, 'ended_at')
    redis.call('HINCRBY', plan, 'fence', 1)
    make_due(job, 'plan', 0)
  end
  return true
end

local operations = {}

operations.submit = function(job, text)
  if get(job_key(job), 'state') or redis.call('EXISTS', P .. 'over:' .. job) > 0 then return answer('existing', job) end
  local given = cjson.decode(text)
  if present(given.flight) then
    local running = get(P .. 'flight', given.flight)
    if running and redis.call('EXISTS', job_key(running)) == 1 then return answer('existing', running) end
  end
  local queued = redis.call('ZCARD', P .. 'unfinished')
  if given.max_queued and queued >= given.max_queued then
    count('jobs_refused_total')
    return answer('full', tostring(queued))
  end
  if present(given.submitter) then
    local own = number(P .. 'submitters', given.submitter)
    if given.max_per_submitter and own >= given.max_per_submitter then
      count('jobs_refused_total')
      return answer('submitter_full', tostring(own))
    end
    redis.call('HINCRBY', P .. 'submitters', given.submitter, 1)
  end
  local held = ''
  if present(given.waits_for) then
    local state = get(job_key(given.waits_for), 'state')
    if state and not ENDED[state] then
      held = given.waits_for
      redis.call('SADD', P .. 'waiters:' .. held, job)
    end
  end
  redis.call('HSET', job_key(job), 'kind', given.kind, 'model_name', given.model_name, 'params', given.params,
    'state', 'queued', 'step', given.steps[1].name, 'steps', '', 'open', 0, 'created_at', now, 'ttl', given.ttl_ms,
    'submitter', given.submitter or '', 'batch_id', given.batch_id or '', 'flight', given.flight or '',
    'waits_for', given.waits_for or '', 'held', held, 'on_node_loss', given.on_node_loss or '')
  if present(given.flight) then redis.call('HSET', P .. 'flight', given.flight, job) end
  redis.call('ZADD', P .. 'jobs', now, job)
  redis.call('ZADD', P .. 'unfinished', now, job)
  if given.kind == 'request' then redis.call('ZADD', P .. 'requests:' .. given.model_name, now, job) end
  -- Steps that outlived their job (Redis dropped it alone, and it comes back) are not counted as open.
  for _, spec in ipairs(given.steps) do redis.call('DEL', step_key(job, spec.name)) end
  count('jobs_submitted_total')
  event(job, 'event', 'submitted', 'state', 'queued')
  put_steps(job, given.steps)
  return answer('created', job)
end

operations.claim = function(job, step, owner, lease_ms, task_id)
  local state = get(job_key(job), 'state')
  if not state then return answer('unknown') end
  if not ENDED[state] and not whole(job) then return answer('closed') end
  local key = step_key(job, step)
  local found = redis.call('HMGET', key, 'state', 'owner', 'lease', 'attempts', 'max', 'not_before', 'fence')
  if not found[1] then return answer('unknown') end
  if found[1] == 'done' then return answer('done') end
  if ENDED[state] or not OPEN[found[1]] then return answer('closed') end
  if found[1] == 'waiting' then return answer('waiting') end
  local attempts, max = tonumber(found[4] or 0), tonumber(found[5])
  local again = found[1] == 'running' and found[2] == owner -- the client's retry of the same claim
  if not again then
    if found[1] == 'running' and tonumber(found[3]) > now then return answer('busy') end
    if found[1] == 'queued' and tonumber(found[6] or 0) > now then return answer('early') end
    if attempts >= max then
      local err = vanished(step, found[2], max)
      give_up(job, step, err)
      return answer('poisoned')
    end
    attempts = attempts + 1
    -- Not just one more: a Redis that was killed may have forgotten the last second, and fences that it gave in it.
    redis.call('HSET', key, 'fence', math.max(number(key, 'fence') + 1, now))
  end
  redis.call('HSET', key, 'state', 'running', 'owner', owner, 'attempts', attempts, 'started_at', now,
    'lease', now + tonumber(lease_ms), 'task_id', task_id)
  redis.call('HDEL', key, 'progress')
  redis.call('ZADD', P .. 'due', now + tonumber(lease_ms), job .. '|' .. step)
  redis.call('HSET', P .. 'running', job .. '|' .. step, owner)
  redis.call('HSET', job_key(job), 'step', step)
  if state == 'queued' then redis.call('HSET', job_key(job), 'state', 'running', 'started_at', now) end
  if not again then
    count('claims_total')
    event(job, 'event', 'claimed', 'step', step, 'state', 'running', 'owner', owner, 'attempts', attempts)
  end
  local more = redis.call('HMGET', job_key(job), 'params', 'model_name', 'lost', 'kind')
  return answer('claimed', get(key, 'fence'), attempts, more[1], more[2], more[3] or '', more[4], get(key, 'args') or '')
end

operations.renew = function(job, step, fence, lease_ms, progress)
  local how = standing(job, step, fence)
  if how ~= 'ok' then return answer(how) end
  local key = step_key(job, step)
  redis.call('HSET', key, 'lease', now + tonumber(lease_ms))
  redis.call('ZADD', P .. 'due', now + tonumber(lease_ms), job .. '|' .. step)
  if progress ~= '' then
    redis.call('HSET', key, 'progress', progress)
    event(job, 'event', 'progress', 'step', step, 'state', 'running', 'progress', progress)
  end
  return answer('ok')
end

operations.commit = function(job, step, fence, text)
  local how = standing(job, step, fence)
  if how == 'done' then return answer('ok') end -- the client's retry of the same commit
  if how ~= 'ok' then return answer(how) end
  if not whole(job) then return answer('fenced') end
  local given, key = cjson.decode(text), step_key(job, step)
  redis.call('HSET', key, 'result', given.result)
  redis.call('HDEL', key, 'error')
  if present(given.job_result) then redis.call('HSET', job_key(job), 'result', given.job_result) end
  close_step(job, step, 'done', '')
  for _, name in ipairs(given.drop) do
    local dropped = step_key(job, name)
    if close_step(job, name, 'lost', '') then redis.call('HINCRBY', dropped, 'fence', 1) end
  end
  for _, following in ipairs(words(get(key, 'next'))) do
    if redis.call('HINCRBY', step_key(job, following), 'pending', -1) == 0 then make_due(job, following, 0) end
  end
  if #given.add > 0 then put_steps(job, given.add) end
  if number(job_key(job), 'open') == 0 then end_job(job, 'done', '') end
  return answer('ok')
end

operations.fail = function(job, step, fence, err, delay_ms, final)
  local how = standing(job, step, fence)
  if how ~= 'ok' then return answer(how) end
  local key = step_key(job, step)
  if final == '1' or number(key, 'attempts') >= number(key, 'max') then
    give_up(job, step, err)
    return answer('failed')
  end
  redis.call('HSET', key, 'error', err)
  make_due(job, step, math.min(math.max(1, tonumber(delay_ms)), LAST_RESEND_MS))
  count('retries_total')
  event(job, 'event', 'retry', 'step', step, 'state', 'queued', 'error', err)
  return answer('retry')
end

operations.defer = function(job, step, fence, delay_ms)
  local how = standing(job, step, fence)
  if how ~= 'ok' then return answer(how) end
  redis.call('HINCRBY', step_key(job, step), 'attempts', -1)
  make_due(job, step, tonumber(delay_ms))
  event(job, 'event', 'step', 'step', step, 'state', 'queued')
  return answer('ok')
end

-- The worker itself goes (its child may be gone already): whatever claim of `owner` runs is taken back.
operations.hand_back = function(job, step, owner)
  local key = step_key(job, step)
  local found = redis.call('HMGET', key, 'state', 'owner')
  if found[1] ~= 'running' or string.sub(found[2] or '', 1, #owner + 1) ~= owner .. '#' then return answer('other') end
  redis.call('HINCRBY', key, 'fence', 1)
  redis.call('HINCRBY', key, 'attempts', -1)
  make_due(job, step, 0)
  event(job, 'event', 'step', 'step', step, 'state', 'queued')
  return answer('ok')
end

operations.cancel = function(job)
  if not get(job_key(job), 'state') then return answer('unknown') end
  return answer(end_job(job, 'cancelled', '') and 'cancelled' or 'ended')
end

-- The node is gone: each of its steps is closed as lost and its job planned again (or waits, by policy).
operations.lose = function(node, err)
  local lost, members = 0, redis.call('SMEMBERS', P .. 'at:' .. node)
  table.sort(members)
  for _, member in ipairs(members) do
    local job, step = string.match(member, '^([^|]+)|(.+)$')
    if lose(job, step, node, err) then lost = lost + 1 end
  end
  return answer(tostring(lost))
end

-- Nothing is due later than the longest delay from now: what is was written before the clock was set back.
local function mend_clock(limit, lease_ms)
  local horizon = now + math.max(LAST_RESEND_MS, 10 * lease_ms)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', P .. 'due', '(' .. string.format('%d', horizon), '+inf', 'LIMIT', 0, limit)) do
    local key = step_key(string.match(member, '^([^|]+)|(.+)$'))
    if get(key, 'state') == 'running' then
      redis.call('HSET', key, 'lease', now + lease_ms)
      redis.call('ZADD', P .. 'due', now + lease_ms, member)
    else
      redis.call('HSET', key, 'not_before', now)
      redis.call('ZADD', P .. 'due', now, member)
    end
  end
end

-- After Redis dropped keys: what remains of each of these jobs is enough, or the job ends.
operations.mend = function(...)
  local ended = 0
  for _, job in ipairs({...}) do
    local key = job_key(job)
    local found = redis.call('HMGET', key, 'state', 'created_at', 'held')
    local awaited = present(found[3]) and (get(job_key(found[3]), 'state') or redis.call('GET', P .. 'over:' .. found[3]))
    if not found[1] or ENDED[found[1]] then
      -- Gone: the journal has it. Ended: nothing is owed.
    elseif not whole(job) then
      ended = ended + 1
    elseif present(found[3]) and (not awaited or ENDED[awaited] and awaited ~= 'done') then
      end_job(job, 'failed', EVICTED)
      ended = ended + 1
    else
      redis.call('ZADD', P .. 'unfinished', 'NX', found[2], job)
      redis.call('ZADD', P .. 'jobs', 'NX', found[2], job)
      if awaited == 'done' then release(job) elseif awaited then redis.call('SADD', P .. 'waiters:' .. found[3], job) end
      for _, step in ipairs(words(get(key, 'steps'))) do
        local was, member = redis.call('HMGET', step_key(job, step), 'state', 'node_id', 'lease', 'owner'), job .. '|' .. step
        if OPEN[was[1]] and present(was[2]) then
          redis.call('SADD', P .. 'at:' .. was[2], member)
          redis.call('SADD', P .. 'nodes_in_use', was[2])
        end
        if was[1] == 'queued' then redis.call('ZADD', P .. 'due', 'NX', now, member) end
        if was[1] == 'running' then
          redis.call('ZADD', P .. 'due', 'NX', was[3], member)
          redis.call('HSET', P .. 'running', member, was[4])
        end
      end
    end
  end
  return answer(tostring(ended))
end

operations.overdue = function(limit, lease_ms)
  mend_clock(tonumber(limit), tonumber(lease_ms))
  local late = redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', now, 'LIMIT', 0, tonumber(limit))
  local due = redis.call('ZCARD', P .. 'due')
  for _, member in ipairs(late) do
    local job, step = string.match(member, '^([^|]+)|(.+)$')
    local key = step_key(job, step)
    local found = redis.call('HMGET', key, 'state', 'owner', 'attempts', 'max', 'sends', 'task', 'queue')
    if found[1] == 'running' then
      count('leases_expired_total')
      if tonumber(found[3]) >= tonumber(found[4]) then
        local err = vanished(step, found[2], found[4])
        give_up(job, step, err)
      else
        redis.call('HSET', key, 'error', cjson.encode({code = 'worker_lost', details = {owner = found[2]},
          message = 'worker ' .. (found[2] or '') .. ' vanished while it ran ' .. step}))
        event(job, 'event', 'retry', 'step', step, 'state', 'queued')
        make_due(job, step, 0)
      end
    elseif found[1] == 'queued' then
      local sends = tonumber(found[5] or 0)
      redis.call('ZADD', P .. 'due', now + math.min(FIRST_RESEND_MS * 2 ^ sends, LAST_RESEND_MS), member)
      -- A queue that nobody empties holds messages for all that is due: more of them would only fill Redis.
      if redis.call('LLEN', P .. 'celery:' .. found[7]) < due then
        redis.call('HSET', key, 'sends', sends + 1)
        if sends > 0 then count('resends_total') end
        wakes[#wakes + 1] = {job, step, found[6], found[7], get(job_key(job), 'model_name') or ''}
      end
    else
      redis.call('ZREM', P .. 'due', member)
    end
  end
  for _, job in ipairs(redis.call('ZRANGEBYSCORE', P .. 'ended', '-inf', now, 'LIMIT', 0, 1000)) do
    redis.call('ZREM', P .. 'ended', job)
    redis.call('ZREM', P .. 'jobs', job)
    for state in pairs(ENDED) do redis.call('ZREM', P .. 'jobs:' .. state, job) end
  end
  return answer(tostring(#late))
end

return operations[op](unpack(ARGV, 2))
