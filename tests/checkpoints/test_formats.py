"""Every format in and out: the same model there and back again, and as other programs see it."""

import io
import json
import logging
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
import torch
from conftest import make_llama, save_llama

from config import LlamaConfig
from llama import load_pretrained
from minllama.checkpoints import formats, hf, llama2c, pt
from minllama.checkpoints.average import settings_of
from minllama.checkpoints.convert import convert
from minllama.checkpoints.layout import EMBEDDING, HEAD, Checkpoint, shapes_of
from minllama.common.errors import InputError
from minllama.common.flags import DEMO
from minllama.inference.decoding import decode
from minllama.inference.sampling import Sampling
from tokenizer import Tokenizer

TOKENS = torch.randint(0, 320, (2, 11), generator=torch.Generator().manual_seed(5))
TIED = pytest.mark.parametrize("tied", [True, False])
HEADS = pytest.mark.parametrize("n_kv_heads", [4, 2, 1])


def random_checkpoint(tied=True, n_kv_heads=2, theta=10000.0, dtype=torch.float32, **changes):
    """The checkpoint of a causal model with random weights."""
    arguments = {"causal": True, "rope_theta": theta, "tie_embeddings": tied}
    llama = make_llama(n_kv_heads=n_kv_heads, **arguments | changes)
    tensors = {name: tensor.to(dtype) for name, tensor in llama.state_dict().items()}
    if tied:
        tensors[EMBEDDING] = tensors[HEAD]
    return Checkpoint(llama.config, tensors, "random")


def same(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two have the very same tensors and describe the same model."""
    return (
        settings_of(a.config) == settings_of(b.config)
        and a.tensors.keys() == b.tensors.keys()
        and all(tensor.dtype == b.tensors[name].dtype for name, tensor in a.tensors.items())
        and all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    )


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer_path):
    """A working folder with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return tmp_path


def assert_refused(path, word: str) -> None:
    with pytest.raises(InputError, match=word):
        formats.load(path)


def logits_of(path) -> torch.Tensor:
    with torch.inference_mode():
        return load_pretrained(path).eval()(TOKENS, targets=TOKENS)[0]


# Hugging Face


@TIED
@pytest.mark.parametrize(
    ("n_kv_heads", "theta", "dtype"), [(4, 1e4, torch.float32), (1, 5e5, torch.bfloat16)]
)
def test_transformers_agrees(folder, tokenizer, tied, n_kv_heads, theta, dtype):
    """It loads our folder without a warning, and we load its folder; logits agree."""
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    checkpoint = random_checkpoint(tied, n_kv_heads, theta, dtype)
    hf.save(checkpoint, folder / "ours", tokenizer)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logger = transformers.logging.get_logger("transformers")
    transformers.logging.set_verbosity_warning()
    logger.addHandler(handler)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32)
    logger.removeHandler(handler)
    assert log.getvalue() == ""
    with torch.inference_mode():
        expected = theirs.eval()(TOKENS).logits
    tolerance = 1e-4 * expected.abs().max()
    assert (logits_of("ours") - expected).abs().max() < tolerance
    theirs.to(dtype).save_pretrained(folder / "theirs")
    assert same(formats.load("theirs"), checkpoint)
    assert (logits_of("theirs") - expected).abs().max() < tolerance


def write_shards(checkpoint: Checkpoint, folder, n: int) -> None:
    """A sharded folder, from a whole one."""
    from safetensors.torch import save_file

    hf.save(checkpoint, folder, None)
    tensors = hf.read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        names = sorted(tensors)[i::n]
        save_file({name: tensors[name] for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_shards_and_old_files_are_read(folder):
    pytest.importorskip("safetensors")
    checkpoint = random_checkpoint(tied=False)
    write_shards(checkpoint, folder / "shards", 3)
    assert same(formats.load("shards"), checkpoint)
    hf.save(checkpoint, folder / "old", None)
    tensors = hf.read_safetensors(folder / "old/model.safetensors")
    torch.save({name: t.clone() for name, t in tensors.items()}, folder / "old/pytorch_model.bin")
    (folder / "old/model.safetensors").unlink()
    assert same(formats.load("old"), checkpoint)
    assert same(formats.load("old/pytorch_model.bin"), checkpoint)


NOT_LLAMA_2 = [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"model_type": "mistral"}, "model_type 'mistral'"),
    ({"head_dim": 16}, "head_dim 16"),
    ({"eos_token_id": [2, 1]}, "eos_token_id"),
    ({"query_pre_attn_scalar": 8}, "query_pre_attn_scalar"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"num_attention_heads": 3}, "n_heads"),
    ({"hidden_size": 10**9}, "has shape"),
    ({"num_hidden_layers": -1}, "n_layers"),
    ({"num_hidden_layers": 10**9}, "n_layers is 1000000000"),
    ({"num_hidden_layers": 10**4}, "is missing"),
    ({"vocab_size": "320"}, "vocab_size"),
]


@pytest.mark.parametrize(("changes", "word"), NOT_LLAMA_2)
def test_other_models_are_refused_by_the_settings_name(folder, changes, word):
    pytest.importorskip("safetensors")
    hf.save(random_checkpoint(), folder / "model", None)
    config = json.loads((folder / "model/config.json").read_text()) | changes
    (folder / "model/config.json").write_text(json.dumps(config))
    assert_refused("model", f"^model.*{word}")


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def point_to(model, name: str) -> None:
    """Change a file name of the index."""
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (model / INDEX).write_text(json.dumps(index))


def put(model, name: str, tensor: torch.Tensor) -> None:
    """Change or add a tensor of the first shard."""
    from safetensors.torch import save_file

    tensors = {n: t.clone() for n, t in hf.read_safetensors(model / FIRST).items()}
    save_file(tensors | {name: tensor}, model / FIRST)


DAMAGE = {
    "truncated": lambda m: (m / FIRST).write_bytes((m / FIRST).read_bytes()[:-100]),
    "empty": lambda m: (m / FIRST).write_bytes(b""),
    "git lfs pull": lambda m: (m / FIRST).write_text("version https://git-lfs.github.com/spec/v1"),
    "absent": lambda m: (m / SECOND).unlink(),
    "outside": lambda m: point_to(m, "../model/" + FIRST),
    "absolute": lambda m: point_to(m, "/etc/passwd"),
    "no-map": lambda m: (m / INDEX).write_text("[1]"),
    "no-json": lambda m: (m / "config.json").write_text("{"),
    "deep": lambda m: (m / "config.json").write_text("[" * 100_000),
    "list": lambda m: (m / "config.json").write_text("[]"),
    "no-sizes": lambda m: (m / "config.json").write_text("{}"),
    "doubled": lambda m: shutil.copy(m / FIRST, m / SECOND),
    "shape": lambda m: put(m, "lm_head.weight", torch.zeros(3, 3)),
    "unexpected": lambda m: put(m, "model.extra", torch.zeros(3)),
    "bias": lambda m: put(m, "model.layers.0.self_attn.q_proj.bias", torch.zeros(32)),
    "integers": lambda m: put(m, "model.norm.weight", torch.ones(32, dtype=torch.int32)),
    "nan": lambda m: put(m, "model.norm.weight", torch.full((32,), torch.nan)),
    "no-weights": lambda m: [path.unlink() for path in m.glob("*.safetensors*")],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused(folder, case):
    pytest.importorskip("safetensors")
    write_shards(random_checkpoint(tied=False), folder / "model", 2)
    DAMAGE[case](folder / "model")
    assert_refused("model", "^model.*git lfs pull" if case == "git lfs pull" else "^model")


def test_a_folder_without_a_sentencepiece_model_needs_tokenizer_path(folder, run_cli):
    pytest.importorskip("safetensors")
    hf.save(random_checkpoint(), folder / "model", None)
    (folder / "model/tokenizer.json").write_text("{}")
    code, _, err = run_cli("--pretrained-model-path", "model")
    assert code == 2 and "only a tokenizer.json" in err
    flags = ["--tokenizer-path", "tokenizer.model", "--max_new_tokens", "1"]
    assert run_cli("--pretrained-model-path", "model", *flags)[0] == 0
    (folder / "empty").mkdir()
    code, _, err = run_cli("--pretrained-model-path", "empty", *flags[:2])
    assert code == 2 and "without config.json or params.json" in err


# Meta


def write_meta(checkpoint: Checkpoint, folder, **params) -> None:
    """As Meta's release."""
    folder.mkdir()
    tensors = {"rope.freqs": torch.ones(4)}
    for name, tensor in checkpoint.tensors.items():
        tensors[re.sub(r"compute_(\w)\w*", r"w\1", name)] = tensor  # wq, wk, wv, wo
    torch.save(tensors, folder / "consolidated.00.pth")
    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads")
    values = {name: getattr(checkpoint.config, name) for name in sizes}
    values |= {"multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(values | params))


@pytest.mark.parametrize(("n_kv_heads", "params"), [(4, {}), (2, {"ffn_dim_multiplier": 1.5})])
def test_meta_folders(folder, n_kv_heads, params):
    assert LlamaConfig(dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3).ffn_dim == 28672  # 70B
    checkpoint = random_checkpoint(False, n_kv_heads, max_seq_len=4096, **params)
    write_meta(checkpoint, folder / "meta", **params)
    assert same(formats.load("meta"), checkpoint)
    assert same(formats.load("meta/consolidated.00.pth"), checkpoint)
    assert formats.tokenizer_beside("meta").resolve() == folder / "tokenizer.model"


def test_damaged_meta_folders_are_refused(folder):
    write_meta(random_checkpoint(tied=False, max_seq_len=4096), folder / "meta")
    first, params = folder / "meta/consolidated.00.pth", folder / "meta/params.json"
    weights = torch.load(first, weights_only=True)
    for change in (torch.tensor(1.0), [1.0]):
        torch.save(weights | {HEAD: change}, first)
        assert_refused("meta", "^meta")
    torch.save({n: t for n, t in weights.items() if "wq" not in n}, first)
    assert_refused("meta", r"compute_query\.weight")
    for text, word in (('{"use_scaled_rope": true}', "use_scaled_rope"), ("{", "not JSON")):
        params.write_text(text)
        assert_refused("meta", word)
    shutil.copy(first, folder / "meta/consolidated.01.pth")
    assert_refused("meta", "a model in 2 parts; fetch its Hugging Face folder")


# llama2.c


@TIED
@HEADS
def test_float_files_of_llama2c(folder, tied, n_kv_heads):
    checkpoint = random_checkpoint(tied, n_kv_heads)
    llama2c.save(checkpoint, "0.bin", version=0)
    assert same(formats.load("0.bin"), checkpoint)
    llama2c.save(formats.load("0.bin"), "again.bin", version=0)
    assert (folder / "again.bin").read_bytes() == (folder / "0.bin").read_bytes()


@TIED
def test_int8_files_of_llama2c_are_within_half_a_step(folder, tied):
    checkpoint = random_checkpoint(tied)
    llama2c.save(checkpoint, "2.bin", version=2)
    loaded = formats.load("2.bin")
    (folder / "cut.bin").write_bytes((folder / "2.bin").read_bytes()[:-4])
    assert_refused("cut.bin", "bytes, but its header describes")
    for name, tensor in checkpoint.tensors.items():
        if tensor.dim() == 1:
            assert torch.equal(loaded.tensors[name], tensor)
            continue
        groups = tensor.reshape(-1, 32)  # the widths are 32 and 96
        half = groups.abs().amax(dim=1, keepdim=True) / 127 / 2
        difference = (loaded.tensors[name].reshape(-1, 32) - groups).abs()
        assert difference.any() and (difference <= half * 1.001).all()


def test_the_original_file_is_the_same_model(real_assets):
    """stories260K.bin is llama2.c's own; stories260K.pt has the same weights."""
    stories = real_assets("stories260K")
    ours, theirs = (formats.load(stories / f"stories260K.{kind}") for kind in ("pt", "bin"))
    assert theirs.config.causal and not ours.config.causal
    for name, tensor in ours.tensors.items():
        assert torch.equal(tensor, theirs.tensors[name]), name


@pytest.fixture
def generate_in_c(folder, real_assets):
    """Converts a model and generates text with llama2.c's run.c or runq.c, at temperature 0."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    for name in ("in", "out"):
        (folder / name).mkdir()

    def generate(program, model, tokenizer, dtype, length, prompt="Once upon a time") -> str:
        source = real_assets("llama2c") / f"{program}.c"
        subprocess.run(["gcc", "-O3", "-o", program, source, "-lm"], check=True)
        shutil.copy(tokenizer, "in/tokenizer.model")
        shutil.copy(model, f"in/model{model.suffix}")
        convert(f"in/model{model.suffix}", "out/model.bin", "llama2c", dtype)
        flags = ["-z", "out/tokenizer.bin", "-t", "0", "-n", str(length), "-i", prompt]
        command = [folder / program, "out/model.bin", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return generate


@pytest.mark.parametrize("prompt", ["Once upon a time", " In 1999 Zoë had 2  cats~{}. He"])
@pytest.mark.parametrize("name", ["stories260K", "demo"])
def test_llama2cs_program_writes_our_text(real_assets, generate_in_c, name, prompt):
    """The demo's byte pieces begin at 4, so that its ids are moved; the text must be the same."""
    model, pieces = DEMO / "model.pt", DEMO / "tokenizer.model"
    if name == "stories260K":
        model = real_assets(name) / "stories260K.bin"
        pieces = real_assets(name) / "tok512.model"
    theirs = generate_in_c("run", model, pieces, "float32", 200, prompt)
    for place in (model, "out/model.bin"):  # read back with the tokenizer beside it
        is_moved = name == "demo" and place != model
        tokenizer = Tokenizer(tokenizer_model="out/tokenizer.model" if is_moved else pieces)
        ids = tokenizer.encode(prompt, bos=True, eos=False)
        llama = load_pretrained(place).eval()
        for (token,) in decode(llama, [ids.copy()], 200 - len(ids), Sampling(0.0)):
            ids.append(token)
        ours = "".join(filter(str.isascii, tokenizer.decode(ids)))  # as run.c prints bytes
        assert len(theirs) > 300 and theirs[:200] == ours.strip()[:200]


def test_a_moved_vocabulary_needs_its_own_folder(folder):
    """Beside the old tokenizer, every byte would be read as another."""
    shutil.copy(DEMO / "tokenizer.model", folder)
    shutil.copy(DEMO / "model.pt", folder / "a.pt")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"tokenizer\.model: .* in another folder"):
        convert("a.pt", "a.bin", "llama2c")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_llama2cs_int8_program_reads_our_file(generate_in_c):
    """Its text need not be ours: it rounds activations too. It begins alike."""
    text = generate_in_c("runq", DEMO / "model.pt", DEMO / "tokenizer.model", "int8", 60)
    assert "there was a little girl named" in text


def header(**changes) -> bytes:
    sizes = {"dim": 32, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    sizes |= {"vocab_size": 320, "max_seq_len": 128}
    return struct.pack("<7i", *(sizes | changes).values())


MAGIC = struct.pack("<I", 0x616B3432)
BAD_HEADERS = {
    "negative": header(dim=-32),
    "huge": header(n_layers=2**31 - 1),
    "huge-dim": header(dim=2**30, n_heads=2**20),
    "zero": header(n_heads=0),
    "odd": header(n_heads=5),
    "short": header()[:20],
    "version-3": MAGIC + struct.pack("<i", 3) + bytes(300),
    "version-1": (MAGIC + struct.pack("<i", 1) + header() + b"\1").ljust(256, b"\0"),
    "no-group": (MAGIC + struct.pack("<i", 2) + header() + b"\1").ljust(256, b"\0"),
    "odd-group": (MAGIC + struct.pack("<i", 2) + header() + b"\1\7").ljust(256, b"\0"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_wrong_sizes_in_a_header_are_refused(folder, name):
    (folder / "bad.bin").write_bytes(BAD_HEADERS[name] + bytes(1000))
    assert_refused("bad.bin", r"^bad\.bin: ")


# Conversion


@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converting_there_and_back_changes_no_bit(folder, tied, dtype):
    pytest.importorskip("safetensors")
    checkpoint = random_checkpoint(tied, dtype=dtype)
    pt.save(checkpoint, "a.pt")
    convert("a.pt", "hf", "hf")
    convert("hf", "b.pt", "pt")
    assert same(formats.load("b.pt"), checkpoint)
    if dtype == torch.float32:
        convert("b.pt", "c.bin", "llama2c")
        convert("c.bin", "d.pt", "pt")
        assert same(formats.load("d.pt"), checkpoint)
        assert (folder / "tokenizer.bin").read_bytes() == Tokenizer().to_llama2c()
    assert (folder / "hf/tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    size = (folder / "b.pt").stat().st_size
    n = sum(int(np.prod(shape)) for shape in shapes_of(checkpoint.config).values())
    n -= 320 * 32 * tied  # stored once
    assert size < n * dtype.itemsize + 20_000
    for to, name in (("pt", "half.pt"), ("hf", "half")):
        convert("a.pt", name, to, "float16")
        assert {t.dtype for t in formats.load(name).tensors.values()} == {torch.float16}


def test_weights_that_were_trained_with_a_mask_are_converted_with_causal(folder):
    pytest.importorskip("safetensors")
    save_llama(make_llama(), folder / "unmasked.pt")
    for to in ("hf", "llama2c"):
        with pytest.raises(InputError, match="add --causal"):
            convert("unmasked.pt", f"{to}-model", to)
        convert("unmasked.pt", f"{to}-model", to, causal=True)
        with torch.inference_mode():
            expected = load_pretrained("unmasked.pt", causal=True)(TOKENS)[0]
            torch.testing.assert_close(load_pretrained(f"{to}-model")(TOKENS)[0], expected)


def test_an_untied_head_may_share_its_storage(folder):
    pytest.importorskip("safetensors")
    checkpoint = random_checkpoint(tied=True)
    checkpoint.config.tie_embeddings = False
    pt.save(checkpoint, "shared.pt")
    convert("shared.pt", "hf", "hf")
    assert same(formats.load("hf"), checkpoint)


def test_refused_conversions_write_nothing(folder):
    save_llama(make_llama(), folder / "unmasked.pt")
    pt.save(random_checkpoint(), "a.pt")
    pt.save(random_checkpoint(theta=500000.0), "theta.pt")
    pt.save(random_checkpoint(layer_norm_eps=1e-6), "epsilon.pt")
    for name in ("full", "new", "other"):
        (folder / name).mkdir()
    (folder / "full/precious").write_text("x")
    (folder / "other/tokenizer.bin").write_text("another")
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    for source, target, to, dtype, word in (
        ("a.pt", "a.pt", "pt", None, "would overwrite"),
        ("a.pt", "full", "hf", None, "already exists"),
        ("a.pt", "other/b.bin", "llama2c", None, "tokenizer.bin"),
        ("a.pt", "c", "hf", "int8", "--dtype int8"),
        ("a.pt", "new/tokenizer.model", "pt", None, "tokenizer"),
        ("unmasked.pt", "c", "hf", None, "mask"),
        ("unmasked.pt", "c", "llama2c", None, "mask"),
        ("theta.pt", "c", "llama2c", None, "rope_theta"),
        ("epsilon.pt", "c", "llama2c", None, "layer_norm_eps"),
    ):
        with pytest.raises(InputError, match=word):
            convert(source, target, to, dtype)
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before


def test_formats_are_recognized_by_content(folder):
    pytest.importorskip("safetensors")
    checkpoint = random_checkpoint()
    llama2c.save(checkpoint, "weights.pt", version=0)
    pt.save(checkpoint, "weights.bin")
    hf.save(checkpoint, folder / "a.pt", None)
    for path in ("weights.pt", "weights.bin", "a.pt", "a.pt/model.safetensors"):
        assert same(formats.load(path), checkpoint), path


@pytest.mark.parametrize("to", ["hf", "llama2c", "pt"])
def test_every_option_reads_every_format(project, run_cli, to):
    if to == "hf":
        pytest.importorskip("safetensors")
    pt.save(random_checkpoint(tied=False), "start.pt")
    name = {"hf": "model", "llama2c": "model.bin", "pt": "copy.pt"}[to]
    convert("start.pt", name, to)
    flags = ["--pretrained-model-path", name]
    assert run_cli(*project.flags, *flags, "--max_new_tokens", "2")[0] == 0
    for option in ("prompt", "finetune"):
        assert run_cli("--option", option, *project.flags, *flags)[0] == 0
    (project.path / "text.txt").write_text("The fox saw the hen.\n<|endoftext|>\n" * 300)
    pretrain = ["--option", "pretrain", "--text", "text.txt", "--steps", "2", "--max_seq_len", "16"]
    code, _, err = run_cli(*pretrain, *flags)
    assert code == 0, err
    trained = formats.load("pretrained/model.pt")
    assert not trained.config.tie_embeddings
    assert not torch.equal(trained.tensors[EMBEDDING], trained.tensors[HEAD])
