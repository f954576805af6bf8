"""Adapters that were exported load in peft and in mlx-lm, and give what the edge serves; what is refused, and why."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge.adapters import export
from clawloop_edge.adapters.errors import WrongLine
from clawloop_edge.adapters.export import ExportForm, export_adapter, form_of
from clawloop_edge.adapters.store import AdapterStore
from clawloop_edge.cli.root import app
from clawloop_edge.home import EdgeHome
from clawloop_edge.node.join import Membership
from clawloop_edge.opening import open_pool
from clawloop_edge.state import keep_membership
from clawloop_shared import config, signing
from clawloop_shared.errors import AdapterInvalid, ConfigError, SignatureInvalid, StorageError
from clawloop_shared.files import sha256
from clawloop_shared.folders import new_folder
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, parse_config
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, open_manifest, sign_manifest
from clawloop_shared.manifest_file import MANIFEST_JSON, read_manifest_file
from clawloop_shared.messages import AdapterOffer
from clawloop_shared.model_line import ModelLine, read_line, read_shape
from demoworld.quantise import quantise

Files = dict[str, bytes]
MakeAdapter = Callable[..., Files]
KEY = signing.new_key()
PUBLIC = signing.public_key(KEY)
IDS = [5, 300, 301, 302, 400, 410, 17, 9]
SAME = 1e-4
"""logits may differ by so much"""


@pytest.fixture(scope="module", params=["float", "4 bits"])
def base(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as it is and with weights of 4 bits."""
    if request.param == "float":
        return tiny_model
    return quantise(tiny_model, tmp_path_factory.mktemp("quantised") / "model", bits=4)


def offer_of(files: Files, line: ModelLine, *, version: int = 3, key: bytes = KEY) -> AdapterOffer:
    settings = parse_config(files[CONFIG_FILE])
    manifest = Manifest(
        line=line,
        version=version,
        previous_sha256="",
        files=[FileEntry(name, len(data), sha256(data)) for name, data in files.items()],
        rank=settings.r,
        alpha=settings.lora_alpha,
        target_modules=settings.target_modules,
        probe=Probe([1, 2], [-1.0]),
        evaluation=Evaluation("none", 0, 0.0, 0.0, 0.0),
        round_id="r",
        lineage_root="",
        created_ms=1,
        expires_ms=2,
    )
    return AdapterOffer(sign_manifest(manifest, key), files)


def served(base: Path, files: Files) -> Any:
    """The logits that the edge serves with: base and adapter apart."""
    from mlx_lm.utils import load_model

    from clawloop_edge.adapters.convert import read_factors
    from clawloop_edge.engine.lora import with_adapter

    return logits(with_adapter(load_model(base)[0], read_factors(files, rank_max=64)))


def logits(model: Any) -> Any:
    import mlx.core as mx

    return np.array(model(mx.array([IDS]))[0].astype(mx.float32))


def exported(base: Path, out: Path, form: ExportForm, files: Files) -> export.Exported:
    offer = offer_of(files, read_line(base))
    return export_adapter(offer, out, form=form, release_key=PUBLIC, model=lambda: base)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("settings", [{"rslora": False}, {"rslora": True, "targets": ("q_proj", "down_proj")}])
def test_peft_loads_the_bytes_that_were_released_and_computes_what_the_edge_serves(
    tiny_model: Path, tmp_path: Path, make_adapter: MakeAdapter, settings: dict[str, Any]
) -> None:
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    files = make_adapter(**settings)
    done = exported(tiny_model, tmp_path / "out", ExportForm.PEFT, files)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, str(done.folder)).eval()
    with torch.no_grad():
        found = adapted(input_ids=torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(found, served(tiny_model, files), atol=SAME, rtol=0)


@pytest.mark.parametrize("settings", [{"rslora": False}, {"rslora": True, "targets": ("q_proj", "down_proj")}])
def test_mlx_lm_loads_the_adapter_folder_unchanged_and_computes_what_the_edge_serves(
    base: Path, tmp_path: Path, make_adapter: MakeAdapter, settings: dict[str, Any]
) -> None:
    from mlx_lm.utils import load_adapters, load_model

    files = make_adapter(folder=base, **settings)
    done = exported(base, tmp_path / "out", ExportForm.MLX, files)
    found = logits(load_adapters(load_model(base)[0], str(done.folder)).eval())
    np.testing.assert_allclose(found, served(base, files), atol=SAME, rtol=0)
    assert np.abs(found - logits(load_model(base)[0])).max() > 0.1  # or the adapter would do nothing
    layers = json.loads((done.folder / CONFIG_FILE).read_text())["lora_parameters"]["keys"]
    assert len(layers) == len(settings.get("targets", range(7))) * read_shape(base).num_hidden_layers


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), None])
def test_a_fused_model_is_loaded_by_mlx_lm_without_an_adapter_and_loses_nothing(
    base: Path, tmp_path: Path, make_adapter: MakeAdapter, targets: tuple[str, ...] | None
) -> None:
    from mlx_lm.utils import load

    files = make_adapter(folder=base, **({"targets": targets} if targets else {}))
    done = exported(base, tmp_path / "out", ExportForm.FUSED, files)
    model, tokenizer = load(str(done.folder))[:2]
    np.testing.assert_allclose(logits(model), served(base, files), atol=SAME, rtol=0)
    assert tokenizer.encode("four tools") == load(str(base))[1].encode("four tools")
    quantised = "quantised" in str(base)
    weights = json.loads((done.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("model.embed_tokens.scales" in weights) == quantised  # what it left alone is as it was
    layers = len(targets or range(7)) * read_shape(base).num_hidden_layers
    assert done.widened == (layers if quantised else 0)


@pytest.mark.parametrize("bits", [0, 4])
def test_a_fused_half_precision_base_computes_what_the_edge_does_in_float32(
    tiny_model: Path, tmp_path: Path, make_adapter: MakeAdapter, bits: int
) -> None:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model, save_model

    from clawloop_edge.adapters.convert import read_factors
    from clawloop_edge.engine.lora import in_float32, with_adapter

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    model, _ = load_model(base)
    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    save_model(base, model)
    base = quantise(base, tmp_path / "quantised", bits=bits) if bits else base
    files = make_adapter(folder=base)
    done = exported(base, tmp_path / "out", ExportForm.FUSED, files)
    wanted = logits(in_float32(with_adapter(load_model(base)[0], read_factors(files, rank_max=64))))
    found = logits(in_float32(load_model(done.folder)[0]))
    np.testing.assert_allclose(found, wanted, atol=SAME, rtol=0)
    assert done.widened == 7 * read_shape(base).num_hidden_layers


def test_the_folder_is_private_and_holds_the_manifest_as_it_was_signed(
    base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    files = make_adapter(folder=base)
    (tmp_path / "peft").mkdir(mode=0o755)
    for form in ExportForm:
        done = exported(base, tmp_path / form, form, files)
        assert stat.S_IMODE(done.folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in done.folder.iterdir()} == {0o600}
        assert done.files == {path.name: path.stat().st_size for path in done.folder.iterdir()}
        signed = read_manifest_file((done.folder / MANIFEST_JSON).read_bytes())
        assert open_manifest(signed, PUBLIC).version == done.version == 3
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted(ExportForm)


def test_what_is_not_as_it_was_released_or_for_another_model_is_not_exported(
    tiny_model: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    files, line = make_adapter(), read_line(tiny_model)

    def refused(error: type[Exception], offer: AdapterOffer, forms: set[ExportForm] | None = None) -> None:
        for form in forms or set(ExportForm):
            with pytest.raises(error):
                export_adapter(offer, tmp_path / "out", form=form, release_key=PUBLIC, model=lambda: tiny_model)
        assert not list(tmp_path.iterdir())

    refused(SignatureInvalid, offer_of(files, line, key=signing.new_key()))
    changed = msgspec.structs.replace(offer_of(files, line), files={**files, WEIGHTS_FILE: files[WEIGHTS_FILE][:-1]})
    refused(AdapterInvalid, changed)
    another = msgspec.structs.replace(line, template_sha256="0" * 64)
    refused(WrongLine, offer_of(files, another), {ExportForm.MLX, ExportForm.FUSED})
    refused(AdapterInvalid, offer_of(make_adapter(size=float("nan")), line), {ExportForm.MLX, ExportForm.FUSED})
    broken = tmp_path.parent / f"{tmp_path.name}-broken"
    broken.mkdir()
    with pytest.raises(ConfigError, match="is no model folder"):
        export_adapter(
            offer_of(files, line), tmp_path / "out", form=ExportForm.FUSED, release_key=PUBLIC, model=lambda: broken
        )


def fill(out: Path, *, fails: bool = False, meanwhile: bool = False, **limits: Any) -> None:
    with new_folder(out, **({"needs_bytes": 1} | limits)) as (draft, target):
        (draft / "file").write_text("mine")
        if fails:
            raise OSError(28, "No space left on device")
        if meanwhile:
            target.mkdir()
            (target / "came meanwhile").write_text("theirs")


def test_a_folder_is_written_whole_or_not_at_all_and_never_over_what_is_there(tmp_path: Path) -> None:
    fill(tmp_path / "full")
    with pytest.raises(ConfigError, match="is not empty"):
        fill(tmp_path / "full")
    with pytest.raises(ConfigError, match="is a file"):
        fill(tmp_path / "full" / "file")
    with pytest.raises(ConfigError, match="make it first"):
        fill(tmp_path / "no" / "where")
    with pytest.raises(StorageError, match=r"2,000 bytes, and 1,999 are free there; make room"):
        fill(tmp_path / "out", needs_bytes=2000, free_bytes=lambda _: 1999)
    with pytest.raises(StorageError, match="No space left on device; nothing of it is left"):
        fill(tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(StorageError, match="nothing of it is left"):
        fill(tmp_path / "out", meanwhile=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["came meanwhile"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out"]


def test_one_form_is_named_at_most() -> None:
    assert form_of(peft=False, mlx=False, fused=False) is ExportForm.PEFT
    assert form_of(peft=False, mlx=False, fused=True) is ExportForm.FUSED
    with pytest.raises(ConfigError, match="--peft and --mlx are different forms"):
        form_of(peft=True, mlx=True, fused=False)


def run(home: EdgeHome, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments])


@pytest.fixture
def joined(tmp_path: Path, tiny_model: Path, make_adapter: MakeAdapter) -> EdgeHome:
    """A home that has joined a server and keeps its adapter 3."""
    home = EdgeHome(tmp_path / "home")
    made = run(home, "setup", "--model", str(tiny_model), "--key-file", "--port", "8123", "--yes")
    assert made.exit_code == 0, made.output
    line = read_line(tiny_model)
    member = Membership(
        device_id="d" * 32,
        url="https://hub",
        ca_pem="",
        root_key=b"r" * 32,
        release_key=PUBLIC,
        line=line,
        device_key=signing.new_key(),
        node_key_pem="",
        node_id=1,
    )
    with open_pool(home, writer=True) as pool:
        keep_membership(pool, member)
    store = AdapterStore.of_key(home.adapters, PUBLIC)
    store.publish(3, offer_of(make_adapter(), line))
    store.point(3)
    return home


@pytest.mark.parametrize("form", ["peft", "mlx", "fused"])
def test_the_command_writes_the_folder_and_says_how_to_use_it(joined: EdgeHome, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    with open_pool(joined, writer=True):  # as a running edge holds it
        done = run(joined, "adapters", "export", "3", "--out", str(out), f"--{form}", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["version"], told["form"], told["folder"]) == (3, form, str(out))
    assert told["size_bytes"] == sum(told["files"].values()) == sum(path.stat().st_size for path in out.iterdir())
    again = run(joined, "adapters", "export", "3", "--out", str(tmp_path / "again"), f"--{form}").output
    assert ("mlx_lm.generate --model" in again) == (form != "peft")
    assert ("--adapter-path" in again) == (form == "mlx")


def test_the_command_names_what_is_kept_and_refuses_a_folder_that_is_not_empty(
    joined: EdgeHome, tmp_path: Path
) -> None:
    unknown = run(joined, "adapters", "export", "9", "--out", str(tmp_path / "out")).exception
    assert isinstance(unknown, ConfigError)
    assert "adapter 9 is not kept here; kept are [3]" in str(unknown)
    full = run(joined, "adapters", "export", "3", "--out", str(joined.folder)).exception
    assert isinstance(full, ConfigError)
    assert "is not empty" in str(full)
    assert run(joined, "adapters", "export", "0", "--out", str(tmp_path / "out")).exit_code == 2
    found = joined.load_config()
    without = msgspec.structs.replace(found, model=msgspec.structs.replace(found.model, path=""))
    config.save(joined.config_file, without)
    nothing = run(joined, "adapters", "export", "3", "--out", str(tmp_path / "out"), "--fused").exception
    assert isinstance(nothing, ConfigError)
    assert "[model] path names no model folder, which --fused needs" in str(nothing)
    assert run(joined, "adapters", "export", "3", "--out", str(tmp_path / "out")).exit_code == 0


def test_a_full_disk_in_the_middle_leaves_nothing(
    tiny_model: Path, tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clawloop_edge.engine import fusing

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[save] no space left")

    monkeypatch.setattr(fusing, "save_model", full)
    with pytest.raises(StorageError, match=r"no space left; nothing of it is left"):
        exported(tiny_model, tmp_path / "out", ExportForm.FUSED, make_adapter())
    assert not list(tmp_path.iterdir())
