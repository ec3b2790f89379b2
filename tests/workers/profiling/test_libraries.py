"""Files that the quantisation libraries themselves write, for the CPU: the model's parameters, and nothing missing.

The libraries live in a folder of their own, made here, beside the installed torch and transformers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.checkpoint.folder import open_folder
from workers.checkpoint.headers import read_headers
from workers.generator import generate

#: They and what they import, without the torch that some ask for.
LIBRARIES = ("hqq==0.2.8.post1", "torchao==0.18.0", "optimum-quanto==0.2.7", "termcolor", "loguru", "ninja")

_WRITE = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file

out = Path(sys.argv[1])
config = transformers.LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)
transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out / "plain")

def fresh(**how):
    return transformers.LlamaForCausalLM.from_pretrained(out / "plain", dtype=torch.bfloat16, **how)

def save(name, state):
    (out / name).mkdir()
    kept = {key: each.contiguous() for key, each in state.items() if isinstance(each, torch.Tensor)}
    save_file(kept, out / name / "model.safetensors")
    (out / name / "config.json").write_bytes((out / "plain" / "config.json").read_bytes())

import torchao.quantization as ao
for kind in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"):
    how = transformers.TorchAoConfig(getattr(ao, kind)())
    fresh(quantization_config=how, device_map="cpu").save_pretrained(out / f"torchao-{kind}")

from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
for bits in (8, 4, 3, 2, 1):
    model = fresh()
    state = {key: each for key, each in model.state_dict().items() if "_proj." not in key}
    for path, module in model.named_modules():
        if path.endswith("_proj"):
            how = BaseQuantizeConfig(nbits=bits, group_size=64)
            packed = HQQLinear(module, how, compute_dtype=torch.bfloat16, device="cpu")
            state |= {f"{path}.{key}": each for key, each in packed.state_dict().items()}
    save(f"hqq{bits}", state)

from optimum.quanto import freeze, qfloat8, qint2, qint4, qint8, quantize
for kind in (qint8, qint4, qint2, qfloat8):
    model = fresh()
    quantize(model, weights=kind, exclude="lm_head")
    freeze(model)
    save(f"quanto-{kind.name}", model.state_dict())
"""


@pytest.mark.deep
def test_what_the_libraries_write_has_the_models_parameters(tmp_path: Path) -> None:
    libraries = tmp_path / "libraries"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(libraries), *LIBRARIES]
    if subprocess.run(install, check=False, capture_output=True).returncode:
        pytest.skip("the libraries could not be installed")
    # Behind what is installed already, so that nothing of that is replaced.
    code = f"import sys; sys.path.append({str(libraries)!r}){_WRITE}"
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "made")], check=True, timeout=300, env=env)
    found = {folder.name: folder for folder in (tmp_path / "made").iterdir()}
    assert len(found) == 13
    right = generate(open_folder(found["plain"]))
    for name, folder in sorted(found.items()):
        profile = generate(open_folder(folder))
        assert [layer.num_params for layer in profile.layers] == [layer.num_params for layer in right.layers], name
        assert profile.total_compute == right.total_compute, name
        assert profile.missing_tensors == (), name
        assert profile.total_bytes == read_headers(open_folder(folder)).total_bytes, name
        assert (profile.overhead_bytes > 0) == (name != "plain"), name
        assert generate(open_folder(folder), compute=False).total_params in {right.total_params, None}, name
