"""Time networks with and without exits on a GPU, and check their answers, within a budget of seconds.

    benchmarks/gpu/run.sh                       # on a GPU, about 8 minutes; results go to $OUT, by default runs/gpu
    benchmarks/gpu/run.sh --rehearse            # every line on the CPU, with tiny networks

One process per network and precision builds and compiles its engines, all at the same time; then they measure one by
one (`times.py` says what). `run.json` collects what is there after every step; what no longer fits into the
budget is listed under "skipped".
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from networks import NETWORKS

from branchynet.environment import environment

HERE = Path(__file__).parent
LATE = "no time was left"
BUILD, LAST = 0.55, 15  # share of the budget after which no build is waited for; seconds kept for the end


class Worker:
    """A process of `times.py`."""

    def __init__(self, network, precision, options):
        self.name = f"{network}, {precision}"
        command = [sys.executable, HERE / "times.py", "--network", network, "--precision", precision]
        command += ["--out", options.out, *(["--rehearse"] if options.rehearse else [])]
        log = (options.out / f"{network.replace('/', '')}-{precision}.log").open("w")
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put(None)

    def tell(self, order):
        try:
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it failed; `wait` finds no answer

    def wait(self, until):
        """Return what is wrong if the process does not answer before `until`, or ends; else an empty string."""
        try:
            answer = self.lines.get(timeout=max(0.1, until - time.time()))
        except queue.Empty:
            return LATE
        return "" if answer is not None else "failed, see its log"


def collect(options, skipped, parity):
    """Write everything that is known so far."""
    files = sorted(options.out.glob("*-*.json"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "command": "benchmarks/gpu/run.sh",
        "device": device,
        "environment": environment(),
        "parity": parity,
        "networks": [json.loads(path.read_text()) for path in files],
        "skipped": skipped,
    }
    partial = options.out / "run.json.part"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(options.out / "run.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--precisions", default="fp16,float32")
    parser.add_argument("--rehearse", action="store_true", help="tiny networks on the CPU")
    options = parser.parse_args()
    start = time.time()
    end = start + options.budget - LAST
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found; --rehearse runs this on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("*-*.json"):
        old.unlink()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    rehearsing = ["--rehearse"] if options.rehearse else []
    command = [sys.executable, HERE / "parity.py", "--out", options.out, *rehearsing]
    checking = subprocess.Popen(list(map(str, command)))
    networks, precisions = options.networks.split(","), options.precisions.split(",")
    pairs = [(network, precision) for precision in precisions for network in networks]
    if options.rehearse:  # each network, and each precision
        pairs = [(network, precisions[n % len(precisions)]) for n, network in enumerate(networks)]
    workers = [Worker(network, precision, options) for network, precision in pairs]
    skipped, parity = [], "not finished"

    def step(name, working, orders, until, one_by_one=True):
        """Send an order to each worker, one by one or to all at once, and return those that answer in time."""
        done = []
        for worker in [] if one_by_one else working:
            worker.tell(orders)
        for worker in working:
            if time.time() > until:
                skipped.append(f"{worker.name}: {name}: {LATE}")
                continue
            if one_by_one:
                worker.tell(orders)
            if wrong := worker.wait(until):
                skipped.append(f"{worker.name}: {name}: {wrong}")
            else:
                done.append(worker)
            collect(options, skipped, parity)
            print(f"{time.time() - start:.0f} s: {worker.name}: {name}", flush=True)
        return done

    ready = []
    for worker in workers:  # they build side by side
        if wrong := worker.wait(start + BUILD * options.budget):
            skipped.append(f"{worker.name}: building: {wrong}")
            worker.process.kill()
        else:
            ready.append(worker)
        print(f"{time.time() - start:.0f} s: {worker.name}: {'ready' if worker in ready else 'not ready'}", flush=True)
    try:
        parity = json.loads((options.out / "parity.json").read_text()) if checking.wait(60) in (0, 1) else "failed"
    except subprocess.TimeoutExpired:
        parity = LATE
    except (OSError, ValueError):
        parity = "failed"
    collect(options, skipped, parity)
    ready = step("batches", ready, f"batches {end}", end)
    ready = step("compiling batch 1", ready, "single", end - 20, one_by_one=False)
    ready = step("batch 1", ready, f"one {end}", end)
    for worker in workers:
        worker.tell("end")
    for worker in workers:
        try:
            worker.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.process.kill()
    collect(options, skipped, parity)
    print(f"{time.time() - start:.0f} s in all; skipped: {skipped or 'nothing'}", flush=True)
    wrong = parity == "failed" if isinstance(parity, str) else not all(one["passed"] for one in parity.values())
    sys.exit(wrong or not all(reason.endswith(LATE) for reason in skipped))  # a slow machine is no fault


if __name__ == "__main__":
    main()
