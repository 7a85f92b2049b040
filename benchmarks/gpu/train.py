"""Train ResNet-20, -32, -56 and -110 on CIFAR-10 with one modern recipe on one GPU, then B-ResNet-110.

Part 1 trains the four plain networks side by side, each from nothing, on the 45,000 training images of `load_data`.
Part 2 continues from ResNet-110: with the published branches (joint training), and plain for as many epochs.

Recipe of both parts: batches of 256, SGD with Nesterov momentum 0.9 and weight decay 5e-4, linear warm-up and cosine
decay to 0, label smoothing 0.1, random crops from 4 pixels of padding, mirrored images, one 8 x 8 square of grey in
every image; bfloat16 autocast, channels_last. Gradients are clipped to norm 5. The number of epochs is
set from the time of the first steps, before training begins, to fit into the given seconds; the schedule always ends.

A step is one CUDA graph: select the batch, forward, backward, update. Each network has its own stream; they take turns.

    python benchmarks/gpu/train.py --out FOLDER --seconds 400       # weights and train.json
    python benchmarks/gpu/train.py --trial                          # times of a step, without data
    python benchmarks/gpu/train.py --out FOLDER --rehearse          # a few steps of ResNet-8 on the CPU

Validation accuracies are from the 5,000 held-out images, test accuracies from the 10,000 test images. No decision
depends on either.
"""

import argparse
import contextlib
import json
import platform
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from branchynet import zoo
from branchynet.data import load_data
from branchynet.nn.weights import save_weights
from branchynet.zoo.resnet import BasicBlock

BATCH, SMOOTHING, CLIP = 256, 0.1, 5.0
PLAIN = (20, 32, 56, 110)
RATES = 0.2, 0.02  # peak learning rates of both parts
WARMUP = 0.1  # of the steps
SHARE = 0.3  # of the time, for part 2


def augmented(images, generator):
    """A new random crop, mirror and grey square for each of `(S, C, H, W)` uint8 images, channels last."""
    count, _, height, width = images.shape
    device = images.device

    def draw(high):
        return torch.randint(high, (count, 1, 1), generator=generator, device=device)

    padded = F.pad(images, (4, 4, 4, 4))
    top, left, mirrored, y0, x0 = draw(9), draw(9), draw(2), draw(height), draw(width)
    rows = torch.arange(height, device=device)[None, :, None]
    columns = torch.arange(width, device=device)[None, None, :]
    columns_ = torch.where(mirrored.bool(), width - 1 - columns, columns)
    sample = torch.arange(count, device=device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[sample, top + rows, left + columns_]  # (S, H, W, C)
    square = ((rows - y0).abs() < 4) & ((columns - x0).abs() < 4)
    cropped.masked_fill_(square[..., None], 120)
    return cropped.permute(0, 3, 1, 2)


def rates(steps, peak):
    """The learning rate of each step."""
    warm = max(1, round(WARMUP * steps))
    up = torch.linspace(peak / warm, peak, warm)
    down = peak * 0.5 * (1 + torch.cos(torch.linspace(0, torch.pi, steps - warm + 1)[1:]))
    return torch.cat([up, down])


class Job:
    """The training of one network: `step` is one CUDA graph on a stream of its own, or plain calls on a CPU."""

    def __init__(self, name, net, images, labels, peak, seed):
        self.name, self.net, self.peak = name, net, peak
        self.images, self.labels = images, labels
        self.device = images.device
        self.cuda = self.device.type == "cuda"
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.net.to(self.device, memory_format=torch.channels_last).train()
        self.steps = len(images) // BATCH
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        self.pixels = images.new_zeros(images.shape).contiguous(memory_format=torch.channels_last)
        self.order = torch.zeros(self.steps * BATCH, dtype=torch.int64, device=self.device)
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.offsets = torch.arange(BATCH, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.rates = None
        self.done = 0

    def turn(self):
        """Return the context of the job: its CUDA stream, or none on a CPU."""
        return torch.cuda.stream(self.stream) if self.cuda else contextlib.nullcontext()

    def _step(self):
        rows = self.order[self.at * BATCH % len(self.order) + self.offsets]
        x = self.pixels.index_select(0, rows).contiguous(memory_format=torch.channels_last).float().div_(255)
        y = self.labels.index_select(0, rows)
        self.lr.copy_(self.rates.index_select(0, self.at).squeeze())
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs = self.net(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(F.cross_entropy(o.float(), y, label_smoothing=SMOOTHING) for o in outputs)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.optimizer.step()
        self.loss.lerp_(loss.detach(), 0.01)
        self.at += 1

    def prepare(self):
        """Warm up, restore the state of the network, and capture the step."""
        kept = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.rates = torch.zeros(10**6, device=self.device)  # of rate 0 until `plan`; same storage in the graph
        with self.turn():
            for _ in range(3):
                self._step()
        if self.cuda:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._step()
            torch.cuda.synchronize()
        self.step = self.graph.replay if self.cuda else self._step
        self.restore = kept

    def plan(self, epochs):
        """Set the schedule and start from the beginning."""
        self.net.load_state_dict(self.restore)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.at.zero_()
        self.rates[: epochs * self.steps] = rates(epochs * self.steps, self.peak).to(self.device)

    def shuffle(self):
        """Draw a new order and new augmentations for an epoch."""
        self.order.copy_(
            torch.randperm(len(self.images), generator=self.generator, device=self.device)[: len(self.order)]
        )
        for rows in torch.arange(len(self.images), device=self.device).split(9000):
            self.pixels[rows] = augmented(self.images[rows], self.generator)


@torch.no_grad()
def accuracies(net, split, device):
    """Accuracy per exit, in float32."""
    net.eval()
    images, labels = split.images.to(device), split.labels.to(device)
    right = 0
    with torch.compiler.set_stance("force_eager"):  # compiling once more would take longer than it saves
        for x, y in zip(images.split(1000), labels.split(1000), strict=True):
            outputs = net(x.float().div(255).contiguous(memory_format=torch.channels_last))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            right = right + torch.stack([(o.argmax(1) == y).sum() for o in outputs])
    net.train()
    return [round(float(r) / len(labels), 5) for r in right]


def wait(device):
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_an_epoch(jobs, device, steps):
    """Seconds of one epoch of all jobs, estimated from `steps` steps and one shuffle."""
    for job in jobs:
        with job.turn():
            job.shuffle()
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        for job in jobs:
            with job.turn():
                job.step()
    wait(device)
    stepping = (time.perf_counter() - start) / steps * jobs[0].steps
    start = time.perf_counter()
    for job in jobs:
        with job.turn():
            job.shuffle()
    wait(device)
    return stepping + time.perf_counter() - start


def train(jobs, epochs, val, device):
    """Train all jobs side by side; return rows of history."""
    for job in jobs:
        job.plan(epochs)
    wait(device)
    start, rows = time.perf_counter(), []
    for epoch in range(1, epochs + 1):
        for job in jobs:
            with job.turn():
                job.shuffle()
        for _ in range(jobs[0].steps):
            for job in jobs:
                with job.turn():
                    job.step()
        if epoch % 10 == 0 or epoch == epochs:
            wait(device)
            for job in jobs:
                seconds = round(time.perf_counter() - start, 1)
                row = {"network": job.name, "epoch": epoch, "seconds": seconds, "loss": round(float(job.loss), 4)}
                rows.append({**row, "val_accuracy": accuracies(job.net, val, device)})
                print(json.dumps(rows[-1]), flush=True)
    wait(device)
    return rows


def finish(jobs, epochs, rows, data, out, device, report):
    """Write weights and the results so far."""
    for job in jobs:
        save_weights(job.net.cpu().to(memory_format=torch.contiguous_format), out / f"{job.name}.safetensors")
        job.net.to(device, memory_format=torch.channels_last)
        report["networks"][job.name] = {
            "epochs": epochs,
            "peak_rate": job.peak,
            "val_accuracy": accuracies(job.net, data.val, device),
            "test_accuracy": accuracies(job.net, data.test, device),
            "history": [row for row in rows if row["network"] == job.name],
        }
        print(job.name, {k: v for k, v in report["networks"][job.name].items() if k != "history"}, flush=True)
    (out / "train.json").write_text(json.dumps(report, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="for everything, the start included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cpu" if options.rehearse else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found: this trains on a GPU; --rehearse runs a few steps on the CPU")
    if not options.eager and not options.rehearse:
        torch._dynamo.config.recompile_limit = 64
        BasicBlock.forward = torch.compile(BasicBlock.forward, dynamic=False)
    torch.backends.cudnn.benchmark = True
    if options.trial:
        return trial(device)
    data = load_data("cifar10")
    images, labels = data.train.images.to(device), data.train.labels.to(device)
    depths, timed = PLAIN, 30
    if options.rehearse:
        images, labels, depths, timed = images[:BATCH], labels[:BATCH], (8, 14), 1
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    report = {"command": "python benchmarks/gpu/train.py", "device": gpu, "torch": torch.__version__}
    report |= {"seed": options.seed, "precision": "bfloat16 autocast", "batch": BATCH, "networks": {}}
    print(f"data after {time.perf_counter() - began:.0f} s", flush=True)

    jobs = []
    for depth in depths:
        torch.manual_seed(options.seed)
        net = zoo.resnet(depth)
        jobs.append(Job(f"resnet{depth}-cifar10", net, images, labels, RATES[0], options.seed))
        jobs[-1].prepare()
    each = seconds_an_epoch(jobs, device, timed)
    left = (1 - SHARE) * (options.seconds - (time.perf_counter() - began)) - 10
    epochs = 1 if options.rehearse else int(left / each)
    print(f"ready after {time.perf_counter() - began:.0f} s; {each:.2f} s an epoch; {epochs} epochs", flush=True)
    rows = train(jobs, epochs, data.val, device)
    finish(jobs, epochs, rows, data, options.out, device, report)

    trunk = {name: value.clone() for name, value in jobs[-1].net.state_dict().items()}
    depth = depths[-1]
    del jobs
    torch.manual_seed(options.seed)
    branchy = zoo.b_resnet(depth, branches="published")
    branchy.backbone.load_state_dict(trunk)
    plain = zoo.resnet(depth)
    plain.load_state_dict(trunk)
    jobs = [
        Job(f"b_resnet{depth}-published-cifar10", branchy, images, labels, RATES[1], 1 + options.seed),
        Job(f"resnet{depth}_continued-cifar10", plain, images, labels, RATES[1], 1 + options.seed),
    ]
    for job in jobs:
        job.prepare()
    each = seconds_an_epoch(jobs, device, timed)
    epochs = 1 if options.rehearse else int((options.seconds - 10 - (time.perf_counter() - began)) / each)
    print(f"part 2 after {time.perf_counter() - began:.0f} s; {each:.2f} s an epoch; {epochs} epochs", flush=True)
    if epochs < 5 and not options.rehearse:
        raise SystemExit("too little time is left for part 2; part 1 is written")
    rows = train(jobs, epochs, data.val, device)
    finish(jobs, epochs, rows, data, options.out, device, report)


def trial(device):
    """Seconds per epoch of each network alone and of all side by side, on random images."""
    images = torch.randint(256, (10 * BATCH, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (10 * BATCH,), device=device)
    jobs = []
    for depth in PLAIN:
        start = time.perf_counter()
        jobs.append(Job(f"resnet{depth}", zoo.resnet(depth), images, labels, 0.0, 0))
        jobs[-1].prepare()
        prepared = time.perf_counter() - start
        each = seconds_an_epoch(jobs[-1:], device, 30) * 17.5
        print(f"ResNet-{depth}: prepared in {prepared:.1f} s, {each:.2f} s an epoch alone", flush=True)
    print(f"all side by side: {seconds_an_epoch(jobs, device, 30) * 17.5:.2f} s an epoch", flush=True)


if __name__ == "__main__":
    main()
