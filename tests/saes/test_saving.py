"""A folder holds one SAE and nothing of another, and what is uploaded is what was saved."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import file_limit
from kinds import KINDS, of_kind

from diffusers_sae import InputError, LatentStatistics, TopKSAE, load_sae
from diffusers_sae.checksums import write_checksums
from diffusers_sae.saes import ARCHITECTURES


def statistics(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LatentStatistics(torch.tensor([1.0]), *(torch.rand(1, n, generator=generator) for _ in range(3)))


def first(folder, **kwargs):
    """An SAE with all that can lie beside one, saved."""
    torch.manual_seed(0)
    sae = TopKSAE(16, 32, 4, provenance={"note": "The first"})
    sae.labels, sae.statistics = {3: "cat"}, statistics(32)
    sae.save_pretrained(folder, figures={"fvu": 0.1234}, **kwargs)
    for name in ("concepts.safetensors", "detectors.safetensors"):
        (folder / name).write_bytes(b"of the first")
    write_checksums(folder)
    return sae


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def is_equal(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items()
    )


PLAIN = ["README.md", "checksums.json", "config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("provenance", [None, {}, {"site": None, "base_model": None}])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]} {kind[1]}")
def test_an_sae_without_provenance_is_loaded_again(kind, provenance, tmp_path):
    sae = ARCHITECTURES[kind[0]](8, 32, **kind[1], provenance=provenance)
    sae.save_pretrained(tmp_path)
    again = load_sae(tmp_path)
    assert type(again) is type(sae) and is_equal(again, sae) and again.provenance == {}


@pytest.mark.parametrize("second", [TopKSAE(16, 8, 2), TopKSAE(16, 32, 3), TopKSAE(16, 32, 4), of_kind("ReLUSAE", {})])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 1000}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_nothing_is_left_of_another_sae(second, options, tmp_path):
    first(tmp_path, **options)
    second.save_pretrained(tmp_path)
    assert names(tmp_path) == PLAIN
    again = load_sae(tmp_path)
    assert is_equal(again, second) and again.labels is None and again.statistics is None
    card = (tmp_path / "README.md").read_text()
    assert f"| n_latents | {second.n_latents} |" in card and "0.1234" not in card and "cat" not in card


def test_files_that_are_no_part_of_an_sae_are_left_alone(tmp_path):
    first(tmp_path)
    others = {"run.toml": "k = 4", "notes.json": "{}", "sae.safetensors": "not ours", "mine.pt": "mine"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "checkpoint.pt").write_text("a checkpoint")
    TopKSAE(16, 8, 2).save_pretrained(tmp_path)
    assert names(tmp_path) == sorted([*PLAIN, *others, "training"])
    assert {name: (tmp_path / name).read_text() for name in others} == others
    (tmp_path / "notes.json").write_text('{"read": true}')
    assert load_sae(tmp_path).n_latents == 8  # and no checksum is theirs


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 1000}, {"variant": "fp16"}])
@pytest.mark.parametrize("half", [False, True])
def test_of_the_same_sae_what_was_measured_is_kept(half, options, tmp_path):
    first(tmp_path)
    again = TopKSAE.from_pretrained(tmp_path)  # knows nothing of statistics and labels
    again.register_to_config(provenance={"note": "The second"})
    (again.half() if half else again).save_pretrained(tmp_path, **options)
    read = load_sae(tmp_path, **{k: v for k, v in options.items() if k == "variant"})
    assert read.labels == {3: "cat"} and torch.equal(read.statistics.mean, statistics(32).mean)
    assert {"concepts.safetensors", "detectors.safetensors", "held_out.json"} <= set(names(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "| fvu | 0.1234 |" in card and "The second." in card and "The first." not in card
    whole = [n for n in names(tmp_path) if n.startswith("diffusion_pytorch_model")]
    assert ("diffusion_pytorch_model.safetensors" in whole) == (options.get("max_shard_size") is None)
    assert is_equal(load_sae(tmp_path), read) or "variant" in options


def test_an_sae_is_saved_over_the_file_that_it_is_read_from(tmp_path, monkeypatch):
    sae = first(tmp_path)
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    lazy = load_sae(tmp_path)
    assert lazy.W_dec.is_meta
    lazy.save_pretrained(tmp_path)
    again = load_sae(tmp_path)
    assert again.W_dec.is_meta and again.labels == sae.labels
    again.fetch()
    assert is_equal(lazy, sae) and is_equal(again, sae)


def test_a_card_that_was_edited_is_kept_for_the_same_sae_alone(tmp_path):
    sae = first(tmp_path)
    card, edited = tmp_path / "README.md", tmp_path / "README.old.md"
    card.write_text(card.read_text() + "More of it.\n")
    text = card.read_text()
    sae.save_pretrained(tmp_path, figures={"fvu": 0.5})
    assert card.read_text() == text
    TopKSAE(16, 8, 2).save_pretrained(tmp_path)
    assert "| n_latents | 8 |" in card.read_text() and "More" not in card.read_text() and edited.read_text() == text
    card.write_text("Another.")
    TopKSAE(16, 8, 1).save_pretrained(tmp_path)
    assert edited.read_text() == text and (tmp_path / "README.old1.md").read_text() == "Another."


def test_a_card_that_is_there_before_any_sae_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    TopKSAE(16, 8, 2).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_picture_is_that_of_the_sae_whose_card_shows_it(tmp_path):
    picture, card = tmp_path / "picture.png", tmp_path / "README.md"
    picture.write_bytes(b"first")
    sae = first(tmp_path)
    assert "![](picture.png)" in card.read_text()
    sae.save_pretrained(tmp_path)
    assert picture.read_bytes() == b"first" and "![](picture.png)" in card.read_text()
    TopKSAE(16, 8, 2).save_pretrained(tmp_path)
    assert not picture.exists() and (tmp_path / "picture.old.png").read_bytes() == b"first"
    assert "picture.png" not in card.read_text()


LOCAL = ["/models/mine", "./mine", "../mine", "~/mine", "outputs/world/mine", "C:\\models\\mine"]


@pytest.mark.parametrize("base_model", LOCAL)
def test_no_saved_file_tells_a_local_path(base_model, tmp_path):
    sae = TopKSAE(16, 8, 2, provenance={"base_model": base_model, "store": base_model, "license": "mit"})
    sae.save_pretrained(tmp_path / "sae")
    again = TopKSAE.from_pretrained(tmp_path / "sae")
    again.save_pretrained(tmp_path / "again")
    for name in ("sae", "again"):
        card, config = ((tmp_path / name / file).read_text() for file in ("README.md", "config.json"))
        assert base_model not in card and "base_model:" not in card and "license: mit" in card
        assert str(tmp_path) not in card + config
        assert json.loads(config)["provenance"]["base_model"] == "mine"


def test_a_folder_that_exists_is_a_local_path_though_it_looks_like_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sae = TopKSAE(16, 8, 2, provenance={"base_model": "some/model"})
    sae.save_pretrained("one")
    assert "base_model: some/model" in (tmp_path / "one" / "README.md").read_text()
    (tmp_path / "some" / "model").mkdir(parents=True)
    sae.save_pretrained("two")
    assert "some/model" not in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize("wrong", ["labels", "no text", "statistics", "no timesteps", "figures", "no dict", "a file"])
def test_a_save_that_is_refused_changes_nothing(wrong, tmp_path):
    folder = tmp_path / "sae"
    first(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sae, figures = TopKSAE(16, 8, 2), None
    target = folder
    if wrong == "labels":
        sae.labels = {8: "cat"}
    elif wrong == "no text":
        sae.labels = {3: None}
    elif wrong == "figures":
        figures = {"fvu": torch.tensor(0.1)}
    elif wrong == "no dict":
        figures = [0.1]
    elif wrong == "statistics":
        sae.statistics = statistics(32)
    elif wrong == "no timesteps":
        sae.statistics = LatentStatistics(torch.zeros(0), *(torch.zeros(0, 8) for _ in range(3)))
    else:
        target = folder / "config.json"
    with pytest.raises(InputError) as error:
        sae.save_pretrained(target, figures=figures)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError):
        sae.save_pretrained(target if wrong == "a file" else tmp_path / "new", figures=figures)
    assert names(tmp_path) == ["sae"]


BROKEN = ["{", "[]", "null", "3", '"x"', "[" * 100_000, ""]


@pytest.mark.parametrize("name", ["held_out.json", "labels.json"])
@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:5])
def test_the_same_sae_is_not_saved_over_a_broken_file_that_its_card_shows(name, content, tmp_path):
    sae = first(tmp_path)
    sae.labels = None
    (tmp_path / name).write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"{name} (cannot be read as JSON|holds no JSON object).*mend it or delete it"):
        sae.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / name).unlink()
    sae.save_pretrained(tmp_path)
    assert is_equal(load_sae(tmp_path), sae)


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:5])
def test_what_is_no_config_is_that_of_another_sae(content, tmp_path):
    first(tmp_path)
    (tmp_path / "config.json").write_text(content)
    second = TopKSAE(16, 8, 2)
    second.save_pretrained(tmp_path)
    assert is_equal(load_sae(tmp_path), second) and names(tmp_path) == PLAIN


@pytest.mark.parametrize("name", ["README.md", "config.json", "labels.json", "checksums.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is a folder, where an SAE has a file; choose another folder"):
        TopKSAE(16, 8, 2).save_pretrained(tmp_path)
    assert names(tmp_path) == [name]


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "sae"
    first(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sae = TopKSAE(16, 8, 2)

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LatentStatistics, "save", full)
    sae.statistics = statistics(8)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); make room"):
            sae.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and names(tmp_path) == ["sae"]


def test_a_full_disk_is_a_sentence_and_leaves_the_sae_that_was_there(tmp_path):
    first, second = TopKSAE(8, 32, 4), TopKSAE(8, 64, 4)
    first.save_pretrained(tmp_path / "sae")
    before = {file.name: file.read_bytes() for file in (tmp_path / "sae").iterdir()}
    for folder in ("sae", "new"):
        with file_limit(2000), pytest.raises(InputError, match=r"cannot be written \(File too large\); make room"):
            second.save_pretrained(tmp_path / folder)
    assert {file.name: file.read_bytes() for file in (tmp_path / "sae").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_statistics_of_other_latents_are_refused_when_they_are_read(tmp_path):
    first(tmp_path)
    statistics(8).save(tmp_path)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"statistics in .* have a mean of shape \(1, 8\); an SAE of 32 latents"):
        load_sae(tmp_path)


class Hub(ThreadingHTTPServer):
    """Says yes to everything, and remembers what is committed."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.commits = files, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        """Nothing is printed."""

    def answer(self, told):
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        names = self.server.files
        if "/tree/" in self.path:
            self.answer([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names])
        else:
            self.answer({"id": "me/sae", "sha": "0" * 40, "siblings": [{"rfilename": name} for name in names]})

    def do_POST(self):
        data, url = self.rfile.read(int(self.headers["Content-Length"])), f"{self.server.url}/me/sae"
        if "/preupload/" in self.path:
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": each["path"], **plain} for each in json.loads(data)["files"]]})
        elif "/commit/" in self.path:
            self.server.commits.append([json.loads(line) for line in data.splitlines()])
            self.answer({"commitUrl": f"{url}/commit/0", "commitOid": "0" * 40})
        else:
            self.answer({"url": url})


@pytest.fixture
def hub(monkeypatch):
    stale = [
        "labels.json",
        "held_out.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "app.py",
        ".gitattributes",
    ]
    server = Hub(stale)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def committed(hub):
    """What was uploaded, by name, and what was deleted."""
    (lines,) = hub.commits
    files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"}
    return files, {each["value"]["path"] for each in lines if each["key"] == "deletedFile"}


SECRET = [
    "training/checkpoint.pt",
    "training/run.json",
    "training/log.jsonl",
    "optimizer.pt",
    "run.json",
    ".env",
    "x.bin",
]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 1000}])
def test_what_is_uploaded_is_what_was_saved(options, hub, tmp_path):
    folder = tmp_path / "sae"
    (folder / "training").mkdir(parents=True)
    for name in SECRET:
        (folder / name).write_text("secret")
    (folder / "picture.png").write_bytes(b"a picture")
    torch.manual_seed(0)
    sae = TopKSAE(16, 32, 4, provenance={"base_model": str(tmp_path / "model")})
    sae.statistics = statistics(32)
    sae.save_pretrained(folder, push_to_hub=True, repo_id="me/sae", token="hf_x", **options)
    files, deleted = committed(hub)
    assert set(files) == set(names(folder)) - {"training", *SECRET} and "picture.png" in files
    assert all(data == (folder / name).read_bytes() for name, data in files.items())
    assert not any(str(tmp_path).encode() in data or b"secret" in data for data in files.values())
    assert deleted == {"labels.json", "held_out.json", "diffusion_pytorch_model-00001-of-00002.safetensors"} - set(
        files
    )


def test_a_variant_deletes_no_weights_from_the_hub(hub, tmp_path):
    TopKSAE(16, 32, 4).half().save_pretrained(tmp_path / "sae", variant="fp16", push_to_hub=True, token="hf_x")
    files, deleted = committed(hub)
    assert "diffusion_pytorch_model.fp16.safetensors" in files and deleted == {"labels.json", "held_out.json"}


def test_the_method_of_diffusers_uploads_our_card(hub):
    sae = TopKSAE(16, 32, 4)
    sae.labels = {1: "cat"}
    sae.push_to_hub("me/sae", token="hf_x")
    files, _ = committed(hub)
    assert set(files) == {*PLAIN, "labels.json"} and b"# TopKSAE" in files["README.md"]
