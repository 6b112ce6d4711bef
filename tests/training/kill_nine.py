"""Kills captures and trainings with SIGKILL at random moments and checks that they end as undisturbed ones.

`python kill_nine.py FOLDER KILLS PRECISION`. Each run is a fork of a process that has everything imported.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import SITE, Harness

from diffusers_sae import TopKSAE
from diffusers_sae.capture import ActivationStore, StoreConfig, store_activations
from diffusers_sae.training import StreamingConfig, TrainingConfig, train_on_store, train_on_stream

CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}
PRECISION = sys.argv[3]
PROMPTS = [chr(97 + i % 26) * (1 + i // 26) for i in range(40)]


def capture(folder, store):
    store_activations(Harness().pipe, [SITE], PROMPTS, folder, StoreConfig(40, 2, dtype="float32"), **CALL)


def train(folder, store):
    config = TrainingConfig(150, 256, lr=3e-3, dead_after=2000, precision=PRECISION)
    sae = train_on_store(
        ActivationStore(store), lambda d: TopKSAE(d, 64, 4), folder / "training", config, checkpoint_every=10
    )
    sae.save_pretrained(folder)


def stream(folder, store):
    torch.manual_seed(0)
    config = StreamingConfig(40, 2, rows=128, reuse=4.0, buffer=1000, checkpoint_every=4)
    saes = train_on_stream(
        Harness().pipe, {SITE: lambda d: TopKSAE(d, 32, 4)}, PROMPTS, config, folder / "training",
        training={"precision": PRECISION}, **CALL,
    )  # fmt: skip
    saes[SITE].save_pretrained(folder)


def begun(work, folder, store):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work(folder, store)
        os._exit(0)
    return child


def bytes_of(folder):
    """All that is there, but for what a run notes for itself."""
    files = (p for p in folder.rglob("*") if p.is_file() and "training" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(files)}


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main():
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # a fork has no threads but its own
    rng = random.Random(0)
    for work in (capture, train, stream):
        store = root / "capture" / "whole" / SITE
        whole, killed = root / work.__name__ / "whole", root / work.__name__ / "killed"
        start = time.perf_counter()
        assert ended(begun(work, whole, store))
        length = time.perf_counter() - start
        expected, done, finished, seen = bytes_of(whole), 0, 0, set()
        assert len(expected) > 1
        while done < kills or not finished:  # each run goes on where the last was killed, and anew after one that ends
            start, child = time.perf_counter(), begun(work, killed, store)
            if done < kills:
                time.sleep(rng.random() * length)
                os.kill(child, signal.SIGKILL)
            if ended(child):
                length = min(length, time.perf_counter() - start)  # else on a machine that has less to do now, few die
                if bytes_of(killed) != expected:
                    sys.exit(f"{work.__name__}: another result after {done} kills")
                shutil.rmtree(killed)
                finished += 1
            else:
                done += 1
                seen.add(tuple(sorted((str(p), p.stat().st_size) for p in killed.rglob("*") if p.is_file())))
        print(
            f"{work.__name__}: {kills} kills left {len(seen)} states on the disk; {finished} runs ended, all the same"
        )


if __name__ == "__main__":
    main()
