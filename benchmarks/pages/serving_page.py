"""Take the picture of the server's page in docs/serving.md.

Serves the shipped B-LeNet as stages, with records of MNIST, a measured cost and two policies; sends test images for a
while; draws a digit in Chromium.

    pip install playwright && python benchmarks/pages/serving_page.py

Writes docs/images/serving.png. The times in it are those of the machine that runs this.
"""

import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

import torch
from playwright.sync_api import Page, expect, sync_playwright

from branchynet import ExitRecord, Policy, Target, choose, export, measure, record, zoo
from branchynet.data import ImageData, load_data, loader, save_image
from branchynet.serve.presets import write_presets

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "serving.png"
DROPS = {"careful": 0.002, "fast": 0.005}
THRESHOLD = 0.05  # nats; of every exit of the file, so that all can be seen
SECONDS, RATE = 45, 20  # of requests
STROKES = (((22, 30), (28, 22), (76, 22), (70, 36), (40, 86), (60, 84)),)  # in percent of the drawing area


def make(folder: Path, data: ImageData) -> None:
    """Export, record, measure and choose."""
    torch.set_num_threads(1)
    net = zoo.b_lenet(pretrained=True)
    images = data.test.inputs(torch.arange(256))
    found: dict[str, ExitRecord] = {}
    for name, split in (("val", data.val), ("test", data.test)):
        found[name] = record(net, loader(split, 1000), progress=False)
        found[name].save(folder / f"record-{name}.npz")
    cost = measure(net, images, Target(1))
    cost.save(folder / "cost.json")
    chosen = {name: choose(found["val"], cost, max_drop=drop) for name, drop in DROPS.items()}
    write_presets(folder / "policies.json", chosen)
    policy = Policy("entropy", (THRESHOLD,) * 3)
    export(net, folder / "stages", policy=policy, example=images, labels=data.classes, layout="stages")


def send(address: str, data: ImageData, folder: Path) -> None:
    """Send test images, at random times."""
    bodies = []
    for n in range(200):
        save_image(data.test.images[n].numpy(), folder / "image.png")
        bodies.append((folder / "image.png").read_bytes())
    draw, stop = random.Random(0), threading.Event()
    threading.Timer(SECONDS, stop.set).start()
    while not stop.wait(draw.expovariate(RATE)):
        kind = {"Content-Type": "image/png"}
        urllib.request.urlopen(urllib.request.Request(f"{address}/predict", draw.choice(bodies), kind)).read()


def take(page: Page, address: str) -> None:
    """Draw and take the picture."""
    page.goto(address)
    expect(page.locator("#presets button")).to_have_count(1 + len(DROPS))
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    for stroke in STROKES:
        places = [(box["x"] + x * box["width"] / 100, box["y"] + y * box["height"] / 100) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=8)
        page.mouse.up()
    expect(page.locator("#sentence")).to_contain_text("Answered by exit")
    page.mouse.move(2, 2)
    page.wait_for_timeout(2000)
    print(page.locator("#class").inner_text(), page.locator("#sentence").inner_text())
    PICTURE.parent.mkdir(exist_ok=True)
    page.screenshot(path=PICTURE, full_page=True)


def main() -> None:
    """Take the picture."""
    data = load_data("mnist")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "b_lenet"
        folder.mkdir()
        make(folder, data)
        command = [sys.executable, "-m", "branchynet", "serve", str(folder), "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                (address,) = re.findall(r"http\S+", server.stderr.readline())
                send(address, data, Path(temporary))
                with sync_playwright() as started:
                    browser = started.chromium.launch(executable_path=shutil.which("chromium"))
                    take(browser.new_page(viewport={"width": 1000, "height": 800}, reduced_motion="reduce"), address)
                    browser.close()
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
