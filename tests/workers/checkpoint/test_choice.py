"""Which weights are the model's: what transformers' own loader loads, told by the values; and refusals that help."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.cases import make as cases
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from planner.errors import FairshardError, InvalidCheckpoint, InvalidInput, NotFound
from planner.names import Part, check_revision, is_of, join_revision, split_revision
from workers.checkpoint.headers import read_headers
from workers.converter import convert
from workers.downloader import download, resolve
from workers.generator import generate

_CONFIG = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=16,
)  # fmt: skip
#: The weight whose value tells which file was loaded.
_TOLD = "model.norm.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in LlamaForCausalLM(_CONFIG).state_dict().items()}


class Folder:
    """A repository whose files say by their values which they are."""

    def __init__(self, path: Path, weights: Mapping[str, torch.Tensor]) -> None:
        self.path, self._weights = path, weights
        path.mkdir(parents=True)
        self.config()

    def config(self, at: str = "config.json", **more: Any) -> None:
        (self.path / at).parent.mkdir(exist_ok=True)
        values = {**_CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"], **more}
        (self.path / at).write_text(json.dumps(values))

    def file(self, name: str, value: float, names: Callable[[str], bool] = lambda _: True, **more: Any) -> None:
        state = {n: torch.full_like(w, value) for n, w in self._weights.items() if names(n)} | more
        (self.path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".bin"):
            torch.save(state, self.path / name)
        else:
            save_file(state, self.path / name, metadata={"format": "pt"})

    def shards(self, value: float, index: str, pattern: str = "model-0000{}-of-00002.safetensors") -> None:
        halves: tuple[Callable[[str], bool], ...] = (lambda n: "layers" in n, lambda n: "layers" not in n)
        for number, half in enumerate(halves, 1):
            self.file(pattern.format(number), value, half)
        self.index(index, pattern)

    def index(self, name: str, pattern: str, **more: str) -> None:
        where = {n: pattern.format(1 if "layers" in n else 2) for n in self._weights} | more
        (self.path / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))

    def named_by_us(self, **which: Any) -> float:
        """The value of the weight in the file where a profile finds it."""
        found = resolve(self.path, **which)
        tensor = next(tensor for tensor in read_headers(found).tensors if tensor.name == _TOLD)
        return torch.frombuffer(bytearray(found.read(tensor.file, tensor.begin, tensor.end)), dtype=torch.float32)[
            0
        ].item()

    def loaded(self, **which: Any) -> float:
        """The value that transformers loads."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, **which)
        return float(model.get_parameter(_TOLD)[0].item())


_INDEX = "model.safetensors.index.json"


def _single_beside_shards(folder: Folder) -> None:
    folder.shards(2, _INDEX)
    folder.file("model.safetensors", 1)


def _stale_index(folder: Folder) -> None:
    folder.index(_INDEX, "gone-{}.safetensors")
    folder.file("model.safetensors", 1)


def _names_a_tensor_that_is_nowhere(folder: Folder) -> None:
    folder.shards(1, _INDEX)
    folder.index(_INDEX, "model-0000{}-of-00002.safetensors", **{"mtp.fc.weight": "model-00001-of-00002.safetensors"})


def _index_in_disorder(folder: Folder) -> None:
    folder.shards(1, _INDEX)
    folder.index(_INDEX, "model-0000{}-of-00002.safetensors", **{_TOLD: "model-00001-of-00002.safetensors"})


def _stated_in_the_config(folder: Folder) -> None:
    folder.config(transformers_weights="chosen.safetensors")
    folder.file("chosen.safetensors", 1)
    folder.file("model.safetensors", 2)


def _stated_index(folder: Folder) -> None:
    folder.config(transformers_weights="chosen.safetensors.index.json")
    folder.shards(1, "chosen.safetensors.index.json", "chosen-{}.safetensors")
    folder.file("model.safetensors", 2)


def _consolidated_beside_shards(folder: Folder) -> None:
    folder.shards(1, _INDEX)
    folder.file("consolidated.safetensors", 2)


def _adapter_beside(folder: Folder) -> None:
    folder.file("model.safetensors", 1)
    folder.file("adapter_model.safetensors", 2)
    (folder.path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')


def _adapter_before_bin(folder: Folder) -> None:
    folder.file("pytorch_model.bin", 1)
    folder.file("adapter_model.safetensors", 2)
    folder.file("other.safetensors", 3)


def _both_formats(folder: Folder) -> None:
    folder.file("model.safetensors", 1)
    folder.file("pytorch_model.bin", 2)


def _variants(folder: Folder) -> None:
    folder.file("model.bf16.safetensors", 1)
    folder.file("model.fp16.safetensors", 2)
    folder.file("model.safetensors", 3)


def _shards_of_a_variant(folder: Folder) -> None:
    folder.file("model.safetensors", 2)
    folder.shards(1, "model.safetensors.index.bf16.json", "model.bf16-0000{}-of-00002.safetensors")


def _folder_of_its_own(folder: Folder) -> None:
    folder.file("model.safetensors", 2)
    folder.config("inner/config.json")
    folder.file("inner/model.safetensors", 1)
    folder.file("inner/model.fp16.safetensors", 4)


@pytest.mark.parametrize(
    ("made", "which", "value"),
    [
        (_single_beside_shards, {}, 1),
        (_stale_index, {}, 1),
        (_names_a_tensor_that_is_nowhere, {}, 1),
        (_index_in_disorder, {}, 1),
        (_stated_in_the_config, {}, 1),
        (_stated_index, {}, 1),
        (_consolidated_beside_shards, {}, 1),
        (_adapter_beside, {}, 1),
        (_adapter_before_bin, {}, 1),
        (_both_formats, {}, 1),
        (_variants, {}, 3),
        (_variants, {"variant": "bf16"}, 1),
        (_variants, {"variant": "fp16"}, 2),
        (_shards_of_a_variant, {"variant": "bf16"}, 1),
        (_shards_of_a_variant, {}, 2),
        (_folder_of_its_own, {}, 2),
        (_folder_of_its_own, {"subfolder": "inner"}, 1),
        (_folder_of_its_own, {"subfolder": "inner", "variant": "fp16"}, 4),
    ],
)
def test_the_weights_are_those_that_transformers_loads(
    tmp_path: Path,
    weights: dict[str, torch.Tensor],
    made: Callable[[Folder], None],
    which: dict[str, Any],
    value: int,
) -> None:
    folder = Folder(tmp_path / "own" / "model", weights)
    made(folder)
    assert folder.loaded(**which) == folder.named_by_us(**which) == value


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (
            "layout-diffusers",
            ("diffusers pipeline (FluxPipeline)", "--subfolder", "text_encoder", "transformer", "vae"),
        ),
        ("layout-gguf-only", ("GGUF", "model-Q4_K_M.gguf")),
        ("layout-onnx-only", ("ONNX", "onnx/model.onnx")),
        ("layout-peft-adapter", ("adapter", "profile owner/base")),
        ("layout-two-variants", ("bf16, fp16", "--variant")),
        ("layout-weights-in-subfolder", ("fp16/", "--subfolder fp16")),
    ],
)
def test_a_refusal_says_what_is_there_and_what_would_work(tmp_path: Path, case: str, says: tuple[str, ...]) -> None:
    expect = cases.make(case, tmp_path / case)
    with pytest.raises(InvalidCheckpoint) as caught:
        generate(resolve(tmp_path / case), compute=False)
    assert [word for word in says if word not in str(caught.value)] == []
    if "works_with" in expect:
        option, value = expect["works_with"].split()
        which: dict[str, Any] = {option.removeprefix("--"): value}
        found = resolve(tmp_path / case, **which)
        assert generate(found, compute=False).total_params == 106_816
        assert found.revision.endswith(f"~{option.removeprefix('--')}={value}")


@pytest.mark.parametrize("case", cases.named("layout-"))
def test_a_layout_has_the_parameters_of_its_model(tmp_path: Path, case: str) -> None:
    expect = cases.make(case, tmp_path / case)
    if "num_params" in expect:
        assert generate(resolve(tmp_path / case), compute=False).total_params == expect["num_params"]
    if "weights" in expect:
        assert {t.file for t in read_headers(resolve(tmp_path / case)).tensors} == {expect["weights"]}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["flax_model.msgpack"], "Flax"),
        (["tf_model.h5"], "TensorFlow"),
        (["consolidated.00.pth"], "PyTorch (.pth)"),
        (["checkpoint-500/adapter_model.safetensors", "adapter_config.json"], "is an adapter"),
        (["model.q8-00001-of-00002.safetensors", "model.q8-00002-of-00002.safetensors"], "variants only (q8)"),
        (["README.md"], "no weights that can be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InvalidCheckpoint) as caught:
        read_headers(resolve(tmp_path))
    assert says in str(caught.value)


def test_a_part_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    cases.make("layout-two-variants", tmp_path)
    missing: list[tuple[dict[str, Any], str]] = [
        ({"variant": "int8"}, "it has bf16, fp16"),
        ({"subfolder": "onnx"}, "it has none"),
    ]
    for which, says in missing:
        with pytest.raises(NotFound) as caught:
            resolve(tmp_path, **which)
        assert says in str(caught.value)
    for field, wrong in (
        ("variant", "a.b"),
        ("variant", ""),
        ("subfolder", "../x"),
        ("subfolder", "/x"),
        ("subfolder", "a~b"),
    ):
        impossible: dict[str, Any] = {field: wrong}
        with pytest.raises(InvalidInput):
            resolve(tmp_path, **impossible)


def test_a_stated_file_must_be_there_and_be_one(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    folder = Folder(tmp_path / "model", weights)
    for stated, says in (("gone.safetensors", "which is not there"), (3, "must name"), ("x.bin", "must name")):
        folder.config(transformers_weights=stated)
        with pytest.raises(InvalidCheckpoint, match=says):
            read_headers(resolve(folder.path))


def test_a_component_of_a_pipeline_is_a_model_of_its_own(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    cases.make("layout-diffusers", tmp_path / "pipe")
    inner = Folder(tmp_path / "pipe" / "language_model", weights)
    inner.file("model.fp16.safetensors", 1)
    found = resolve(tmp_path / "pipe", subfolder="language_model", variant="fp16")
    profile = generate(found)
    assert profile.approximate == ()
    assert profile.total_params == sum(p.numel() for p in LlamaForCausalLM(_CONFIG).parameters())
    # What is downloaded is that part, under the names that the loader knows.
    folder = download(found, tmp_path / "copy")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert AutoModelForCausalLM.from_pretrained(folder).get_parameter(_TOLD)[0] == 1


def test_a_bin_model_in_the_folder_of_its_modules_is_converted(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    cases.make("layout-sentence-transformers-0_Transformer", tmp_path / "old")
    (tmp_path / "old" / "0_Transformer" / "model.safetensors").unlink()
    folder = Folder(tmp_path / "made", weights)
    folder.file("pytorch_model.bin", 1)
    for name in ("config.json", "pytorch_model.bin"):
        (folder.path / name).rename(tmp_path / "old" / "0_Transformer" / name)
    convert(resolve(tmp_path / "old"), tmp_path / "new")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").get_parameter(_TOLD)[0] == 1


def test_a_revision_says_which_part_is_meant() -> None:
    whole = join_revision("main", subfolder="a/b", variant="bf16")
    assert whole == "main~subfolder=a/b~variant=bf16"
    assert split_revision(check_revision(whole)) == ("main", Part(subfolder="a/b", variant="bf16"))
    assert join_revision(whole, variant="fp16") == "main~subfolder=a/b~variant=fp16"
    assert join_revision(None) is None
    assert split_revision(join_revision(None, variant="bf16")) == (None, Part(variant="bf16"))
    assert is_of("c0ffee~variant=bf16", "~variant=bf16")
    assert not is_of("c0ffee~variant=bf16", None)
    assert not is_of("c0ffee", "~variant=bf16")
    assert is_of("c0ffee", None)
    assert not is_of("c0ffee", "beef")
    for wrong in ("~", "a~b", "a~variant=", "a~variant=b~subfolder=c", "a~subfolder=../x", "a~subfolder=x/"):
        with pytest.raises(FairshardError):
            check_revision(wrong)
