"""What the tests of the API share."""

from __future__ import annotations

import json
from typing import Any

#: Machines of a what-if.
NODES = [
    {"node_id": "big", "flop_per_s": 3e12, "memory_bytes": 8 << 30},
    {"node_id": "small", "flop_per_s": 1e12, "memory_bytes": 2 << 30},
]
#: Metadata of the seed's form.
SEED_METADATA = {
    "model_name": "seed/model",
    "model_type": "transformer",
    "batch_size": 1,
    "sequence_length": 512,
    "layers": [
        {
            "name": f"layers.{index}.weight",
            "shape": [64, 64],
            "num_params": 4096,
            "compute_required": 8192.0,
            "layer_type": "linear",
            "dtype": "torch.float32",
        }
        for index in range(6)
    ],
    "total_compute": 49152.0,
    "total_layers": 6,
    "generated_at": 1700000000.5,
    "node_id": "node_001",
}


def error_of(response: Any) -> dict[str, Any]:
    """The error payload, checked for its form and for what it must never hold."""
    assert response.mimetype == "application/json", response.get_data(as_text=True)[:300]
    found: dict[str, Any] = response.get_json()
    assert set(found) == {"error", "code", "details"}, found
    assert isinstance(found["error"], str)
    assert found["error"]
    assert isinstance(found["details"], dict)
    text = json.dumps(found)
    assert "Traceback" not in text
    assert ".py" not in text
    return found
