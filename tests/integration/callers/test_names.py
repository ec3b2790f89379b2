"""Names without an owner, models that need a caller's own token, and where a plan says its model is."""

from __future__ import annotations

import os

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import Service, until

from planner.errors import AccessDenied, NotFound
from workers.downloader import resolve
from workers.ledger.steps import ENDED
from workers.settings import HubSettings

pytestmark = pytest.mark.xdist_group("main-job")


def test_a_name_without_an_owner_is_kept_as_the_hub_resolves_it(hub: TestHub, service: Service) -> None:
    hub.add_repo("community/tiny2", checkpoint("llama"))
    hub.moved["tiny2"] = "community/tiny2"
    jobs = service.jobs()
    job = jobs.submit_request("tiny2", process={"split": False})
    assert job["model_name"] == job["params"]["model_name"] == "community/tiny2"
    done = until(lambda: (v := jobs.job(job["job_id"]))["state"] in ENDED and v, what="the job")
    assert done["state"] == "done", done
    plan = jobs.latest_plan("tiny2")
    assert plan["model_name"] == "community/tiny2"
    assert plan["model_url"] == f"{os.environ['HF_ENDPOINT']}/community/tiny2"
    assert resolve("tiny2").model_name == "community/tiny2"
    batch = jobs.batches.submit([{"model_name": "tiny2"}, {"model_name": "community/tiny2"}, {"model_name": "none2"}])
    first, second, none = batch["jobs"]
    assert first["job_id"] == second["job_id"]
    assert "knows no model 'none2' without its owner" in none["error"]["message"]
    with pytest.raises(NotFound, match="name it 'owner/name'"):
        jobs.submit_process("none2")


@pytest.mark.parametrize(
    ("ours", "own", "said"),
    [
        ("hf_unknown", None, r"\(HF_TOKEN\) does not open it, and you gave none of your own: accept its terms at"),
        ("hf_unknown", "hf_other", "Your token does not open it"),
        ("", None, "Accept its terms at .* if it has any, and give a token with access: the header X-HF-Token"),
    ],
)
def test_a_caller_without_a_token_of_its_own_reads_that_it_needs_one(
    hub: TestHub, ours: str, own: str | None, said: str
) -> None:
    hub.add_repo("tester/private", checkpoint("llama"), private=True)
    settings = HubSettings.from_env(os.environ | {"HF_TOKEN": ours})
    with pytest.raises((AccessDenied, NotFound), match=said):
        resolve("tester/private", token=own, hub=settings)
