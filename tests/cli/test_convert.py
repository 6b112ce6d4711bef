"""`diffusers-sae convert` writes a folder whole or not at all."""

import os
import signal
from dataclasses import replace

import pytest
from conftest import file_limit, random_sae

from diffusers_sae import Site, load_sae
from diffusers_sae.loaders.formats import FORMATS


@pytest.fixture
def sae_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_sae().save_pretrained(tmp_path / "sae")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize("to", [name for name, layout in FORMATS.items() if layout.write is not None])
@pytest.mark.parametrize("folder", ["out", "new/out", "empty"])
def test_a_new_or_empty_folder_is_filled(command, sae_folder, to, folder):
    (sae_folder / "empty").mkdir()
    assert command("convert", "sae", folder, "--to", to).code == 0
    assert load_sae(sae_folder / folder).n_latents == 32
    assert not [path for path in (sae_folder / folder).parent.iterdir() if path.name.startswith(".")]


def test_a_stopped_command_leaves_nothing(command, sae_folder, monkeypatch):
    layout = FORMATS["sparsify"]

    def stop(sae, folder):
        layout.write(sae, folder)
        os.kill(os.getpid(), signal.SIGINT)
        return folder.exists()  # never reached: the signal comes first

    monkeypatch.setitem(FORMATS, "sparsify", replace(layout, write=stop))
    outcome = command("convert", "sae", "out", "--to", "sparsify")
    assert outcome.code == 130 and "begins anew when it is repeated: diffusers-sae convert sae out" in outcome.err
    assert sorted(path.name for path in sae_folder.iterdir()) == ["file", "sae"]


@pytest.mark.parametrize("to", [name for name, layout in FORMATS.items() if layout.write is not None])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(command, sae_folder, to):
    with file_limit(1000):
        outcome = command("convert", "sae", "out", "--to", to)
    assert outcome.code == 2 and "error: out cannot be written (File too large); make room" in outcome.err
    assert sorted(path.name for path in sae_folder.iterdir()) == ["file", "sae"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sae", "file"), "is there already"),
        (("sae", "file/out"), "cannot be written, since"),
        (("sae", "sae"), "is there already"),
        (("nowhere/at/all", "out"), "is no folder or file here and could not be fetched"),
        (("file", "out"), "file"),
        (("sae", "out", "--site", "unet.mid_block", "--kind", "odd"), "'odd' is not a kind of site"),
        (("sae", "out", "--subfolder", "odd"), "does not exist; its parent holds"),
        (("sae", "out", "--weight-name", "odd"), "odd"),
        (("sae", "out", "--set", "=3"), "is not a setting"),
        (("sae", "out", "--set", "k=9"), "says k = 4, and k = 9 was passed; leave it out"),
    ],
)
def test_a_mistake_is_a_sentence_and_writes_nothing(command, sae_folder, arguments, sentence):
    outcome = command("convert", *arguments)
    assert outcome.code == 2 and sentence in outcome.err
    assert sorted(path.name for path in sae_folder.iterdir()) == ["file", "sae"]


def test_a_kind_is_of_a_site(command, sae_folder):
    refused = command("convert", "sae", "out", "--kind", "update")
    assert refused.code == 2 and "--kind update needs --site" in refused.err
    assert command("check", "emoji-sd", "sae", "--kind", "update").code == 2
    assert not (sae_folder / "out").exists()
    assert command("convert", "sae", "out", "--site", "unet.mid_block", "--kind", "update").code == 0
    assert load_sae(sae_folder / "out").provenance["site"]["kind"] == "update"
    twice = command("convert", "sae", "out2", "--site", "unet.mid_block@input", "--kind", "update")
    assert twice.code == 2 and "--kind update is for a site by its path alone" in twice.err
    assert command("convert", "sae", "out2", "--site", "unet.mid_block@channels,update").code == 0
    assert Site.of(load_sae(sae_folder / "out2").provenance["site"]) == Site.of("unet.mid_block@update,channels")
