"""The page of a server in a browser: Chromium, if it is installed."""

import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from branchynet import BranchyNet, ExitRecord, Policy, choose, export
from branchynet.data import load_data, save_image
from branchynet.serve.presets import write_presets
from helpers.served import COST, PRESETS, digits_folder, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
KEY = "a-key-of-at-least-16-characters"
EVIL = '<img src=x onerror="document.title=1">'

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NOT TESTED in a browser: Chromium is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="NOT TESTED in a browser: playwright is not installed")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="NOT TESTED in a browser: axe is not installed"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of all kinds; a preset and the classes of one have evil names."""
    path = tmp_path_factory.mktemp("served")
    digits = digits_folder(path / "models" / "digits")
    choice = choose(ExitRecord.load(digits / "record-val.npz"), COST, max_drop=0.5)
    write_presets(digits / "policies.json", {**PRESETS, EVIL: PRESETS["fast"], "chosen": choice})
    digits_folder(path / "models" / "whole", layout="nested", records=False)
    vectors = BranchyNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), {"1": nn.Linear(8, 3)})
    export(vectors, path / "models" / "vectors.onnx", policy=Policy(thresholds=(0.5,)), example=torch.randn(2, 4))
    photos = BranchyNet(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 2)), {"1": nn.Linear(8, 2)})
    example = torch.rand(2, 3, 4, 4)
    export(
        photos,
        path / "models" / "photos.onnx",
        policy=Policy(thresholds=(0.5,)),
        example=example,
        labels=[EVIL, f"{EVIL}!"],
    )
    (path / "key.txt").write_text(KEY)
    return path


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder / "models") as found:
        yield found


@pytest.fixture
def page(browser, address):
    """The page of a new visitor; errors in the console end the test, if `expected` does not match them."""
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 1100, "height": 900})
    found, errors = context.new_page(), []
    found.expected = "$^"
    found.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.goto(address)
    expect(found, "#presets button").to_have_count(5)
    yield found
    context.close()
    assert [one for one in errors if not re.search(found.expected, one)] == []


def expect(page, selector):
    return playwright.expect(page.locator(selector))


def draw(page, *points):
    """Draw a line through points, each in percent of the drawing area, with the mouse."""
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    places = [(box["x"] + x * box["width"] / 100, box["y"] + y * box["height"] / 100) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def exits(page):
    return [stage.get_attribute("data-state") for stage in page.locator(".stage").all()]


def move(page, selector, value):
    page.locator(selector).fill(str(value))


def drop(page, name, kind, content):
    """Drop a file on the drawing area."""
    code = """([name, kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
        document.getElementById("pad").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    }"""
    page.evaluate(code, [name, kind, list(content)])


def test_a_drawn_seven_is_a_seven_and_the_slider_moves_its_exit(page):
    draw(page, (28, 20), (74, 20), (46, 88))
    expect(page, "#class").to_have_text("7")
    expect(page, "#sentence").to_contain_text("Answered by exit 1 of 4")
    assert exits(page) == ["answered", "unused", "unused", "unused"]
    expect(page, ".stage >> nth=0").to_contain_text(
        re.compile(r"[\d.]+ (µs|ms|s)\s*entropy [\d.e-]+ is below 0.05: it leaves", re.DOTALL)
    )
    expect(page, "#bars .first").to_contain_text("7")
    expect(page, "#bars li").to_have_count(10)
    last = int(page.locator("#sure").get_attribute("max"))
    move(page, "#sure", last)
    expect(page, "#sentence").to_contain_text("Answered by exit 4 of 4")
    assert exits(page) == ["passed", "passed", "passed", "answered"]
    expect(page, "#class").to_have_text("7")
    slow = page.locator("#speed").inner_text()
    move(page, "#sure", 0)
    expect(page, "#sentence").to_contain_text("Answered by exit 1 of 4")
    assert float(page.locator("#speed").inner_text()[:-1]) > float(slow[:-1])
    expect(page, "#accuracy").to_have_text(re.compile(r"\d\d\.\d\d%"))


def test_a_preset_is_sent_and_shown(page):
    page.get_by_role("button", name="Draw a 7").click()
    expect(page, "#class").to_have_text("7")
    for name, thresholds in PRESETS.items():
        with page.expect_response(re.compile("/predict")) as sent:
            page.get_by_role("button", name=re.compile(f"^{name}")).click()
        assert f"policy={name}" in sent.value.url and sent.value.json()["thresholds"] == list(thresholds.thresholds)
        pressed = page.locator("#presets [aria-pressed=true]")
        playwright.expect(pressed).to_have_count(1)
        playwright.expect(pressed).to_contain_text(name)
        expect(page, "#speed").to_have_text(re.compile("×"))
        expect(page, "#promise").to_be_empty()
    page.get_by_role("button", name="chosen").click()
    expect(page, "#promise").to_contain_text("With 95% confidence, accuracy is at most 50.00 points below")
    move(page, "#sure", 3)
    expect(page, "#promise").to_be_empty()  # it holds for the thresholds of the policy alone


def test_all_samples_are_read_as_their_digits(page):
    for digit in range(10):
        page.get_by_role("button", name=f"Draw a {digit}").click()
        expect(page, "#class").to_have_text(str(digit))


@pytest.mark.parametrize("seed", range(4))
def test_drawings_are_prepared_as_the_digits_of_mnist(page, seed):
    generator = np.random.default_rng(seed)
    gray = np.zeros((280, 280))
    x, y, w, h = generator.integers([5, 5, 60, 60], [90, 90, 180, 180])
    gray[y : y + h, x : x + w] = generator.integers(100, 255, (h, w))
    code = "async ([gray, h, w]) => [...(await import('/page/drawing.js')).centered(new Float32Array(gray), 280, h, w)]"
    found = np.array(page.evaluate(code, [gray.ravel().tolist(), 28, 28]), float).reshape(28, 28)
    rows, columns = np.nonzero(found.any(1))[0], np.nonzero(found.any(0))[0]
    sides = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1])
    assert max(sides) == 20
    assert np.abs(sides - 20 * np.array([h, w]) / max(h, w)).max() <= 0.5  # whole pixels
    center = [(found.sum(axis) * (np.arange(28) + 0.5)).sum() / found.sum() for axis in (1, 0)]
    assert np.abs(np.array(center) - 14).max() <= 0.5 + 1e-6  # moved by whole pixels
    assert abs(found.sum() / 20**2 * max(h, w) ** 2 / gray.sum() - 1) < 0.1  # means of boxes that round to whole pixels


@pytest.mark.parametrize("name, kind", [("broken.png", "image/png"), ("notes.txt", "text/plain")])
def test_a_broken_file_ends_in_the_error_of_the_server_and_the_next_image_works(page, name, kind):
    page.expected = "status of 400"  # Chromium writes that of every answer to its console
    drop(page, name, kind, b"not an image")
    expect(page, "#error").to_contain_text("cannot read the image")
    expect(page, "#class").to_have_text("–")
    page.get_by_role("button", name="Draw a 3").click()
    expect(page, "#class").to_have_text("3")
    expect(page, "#error").to_be_empty()


def test_an_image_file_is_answered(page, tmp_path):
    save_image(load_data("digits").test.images[0].numpy(), tmp_path / "digit.png")
    page.locator("#file").set_input_files(tmp_path / "digit.png")
    expect(page, "#sentence").to_contain_text("Answered by exit")
    drop(page, "digit.png", "image/png", (tmp_path / "digit.png").read_bytes())
    expect(page, "#sentence").to_contain_text("Answered by exit")


def test_without_a_record_sliders_move_the_thresholds(page):
    page.select_option("#model", "whole")
    expect(page, "#record-text").to_contain_text("No record lies beside the model")
    page.get_by_role("button", name="Draw a 7").click()
    expect(page, "#sentence").to_contain_text("Answered by exit 1 of 4")
    for n, exit in ((1, 2), (2, 3), (3, 4)):
        move(page, f"#threshold-{n}", 0)  # never
        expect(page, "#sentence").to_contain_text(f"Answered by exit {exit} of 4")
    page.get_by_role("button", name="As shipped").click()
    expect(page, "#sentence").to_contain_text("Answered by exit 1 of 4")


def test_the_chart_follows_the_traffic(page):
    page.get_by_role("button", name="Draw a 1").click()
    expect(page, "#class").to_have_text("1")
    expect(page, "#chart rect").not_to_have_count(0)
    expect(page, "#legend").to_contain_text(re.compile(r"Exit 1: \d+%"))
    expect(page, "#p99").to_have_text(re.compile(r"µs|ms|s"))


@pytest.mark.parametrize("model", ["digits", "whole"])
def test_a_phone_needs_no_horizontal_scrolling(page, model):
    page.set_viewport_size({"width": 375, "height": 700})
    page.select_option("#model", model)
    page.get_by_role("button", name="Draw a 7").click()
    expect(page, "#sentence").to_contain_text("Answered by exit")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_the_tab_key_reaches_every_control_and_shows_where_it_is(page):
    page.get_by_role("button", name="Draw a 7").click()
    expect(page, "#class").to_have_text("7")
    controls = "button, select, input, a[href]"
    code = f"[...document.querySelectorAll('{controls}')].filter((e) => e.getClientRects().length)"
    count = page.evaluate(f"{code}.length")
    page.evaluate(f"window.seen = new Set(); {code}.forEach((e) => e.addEventListener('focus', () => seen.add(e)))")
    page.evaluate("document.activeElement.blur()")
    page.mouse.click(2, 2)
    for _ in range(count + 3):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement !== document.body"):
            shown = "(e) => getComputedStyle(e.type === 'file' ? e.nextElementSibling : e).outlineStyle"
            assert page.evaluate(f"({shown})(document.activeElement)") == "solid"
    assert page.evaluate("seen.size") == count > 15


def test_the_keyboard_draws_and_moves_the_slider(page):
    page.get_by_role("button", name="Draw a 2").focus()
    page.keyboard.press("Enter")
    expect(page, "#class").to_have_text("2")
    page.locator("#sure").focus()
    page.keyboard.press("End")
    expect(page, "#sentence").to_contain_text("Answered by exit 4 of 4")
    assert "times as fast" in page.locator("#sure").get_attribute("aria-valuetext")


def test_a_finger_draws(browser, address):
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 375, "height": 700}, has_touch=True)
    page = context.new_page()
    page.goto(address)
    expect(page, "#presets button").to_have_count(5)
    page.locator("#canvas").scroll_into_view_if_needed()
    box, session = page.locator("#canvas").bounding_box(), context.new_cdp_session(page)
    places = [(28 + t, 20) for t in range(0, 47, 4)] + [(74 - t, 20 + 2.4 * t) for t in range(0, 29, 4)]
    for n, (x, y) in enumerate(places):
        point = {"x": box["x"] + x * box["width"] / 100, "y": box["y"] + y * box["height"] / 100}
        kind = "touchStart" if n == 0 else "touchMove"
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    expect(page, "#class").to_have_text("7")
    assert page.locator("#canvas").bounding_box() == box  # the page has not scrolled
    context.close()


def test_a_server_that_does_not_answer_is_named_until_it_answers_again(page):
    page.expected = "ERR_FAILED"
    page.route("**/traffic", lambda route: route.abort())
    expect(page, "#error").to_contain_text("The server does not answer")
    page.unroute("**/traffic")
    expect(page, "#error").to_be_empty()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("model", ["digits", "whole", "vectors"])
def test_axe_finds_nothing(browser, address, scheme, model):
    context = browser.new_context(reduced_motion="reduce", color_scheme=scheme, bypass_csp=True)  # axe is a script
    page = context.new_page()
    page.goto(f"{address}/?model={model}")
    expect(page, "#presets button").not_to_have_count(0)
    if model != "vectors":
        page.get_by_role("button", name="Draw a 7").click()
        expect(page, "#class").to_have_text("7")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    context.close()


def test_names_from_the_server_are_text(page):
    expect(page, "#presets").to_contain_text(EVIL)
    assert page.locator("#presets img").count() == 0 and page.title() == "BranchyNet"


def test_models_that_read_no_image_say_so(page):
    page.select_option("#model", "vectors")
    expect(page, "#input-text").to_contain_text("does not read one image; send requests to /v2/models/vectors/infer")
    expect(page, "#file").to_be_disabled()
    expect(page, "#samples").to_be_hidden()
    expect(page, ".stage").to_have_count(2)


def test_color_models_take_image_files_and_evil_names_of_classes_are_text(page, tmp_path):
    save_image(np.zeros((3, 9, 12)), tmp_path / "photo.png")
    page.select_option("#model", "photos")
    expect(page, "#input-text").to_contain_text("Drop an image here")
    expect(page, "#samples").to_be_hidden()
    drop(page, "photo.png", "image/png", (tmp_path / "photo.png").read_bytes())
    expect(page, "#class").to_contain_text(EVIL)
    assert page.locator("main img").count() == 0 and page.title() == "BranchyNet"


def test_the_page_of_the_interface_needs_no_other_machine(browser, address):
    context = browser.new_context()
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{address}/docs")
    expect(page, ".opblock").to_have_count(22)
    assert errors == [] and all(url.startswith((address, "data:")) for url in asked)
    context.close()


def test_with_a_key_the_page_asks_for_it(browser, folder):
    with serving(folder / "models", "--api-key-file", str(folder / "key.txt")) as address:
        context = browser.new_context(reduced_motion="reduce")
        page = context.new_page()
        page.goto(address)
        page.get_by_label("Key", exact=True).fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page, "#error").to_contain_text("no valid API key")
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        expect(page, "#key-form").to_be_hidden()
        page.get_by_role("button", name="Draw a 5").click()
        expect(page, "#class").to_have_text("5")
        expect(page, "#error").to_be_empty()
        page.reload()
        page.get_by_role("button", name="Draw a 6").click()
        expect(page, "#class").to_have_text("6")
        context.close()
