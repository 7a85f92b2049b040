"""Generated blocks for `tables.py`: which runtimes run which files, and what other tools make of them."""

from blocks import results

LAYOUTS = {
    "default": "by default",
    "input": '`thresholds="input"`',
    "batch 1": '`free="none"`',
    "stages": '`layout="stages"`',
    "flat": "`policy=None`",
}
NAMES = {
    "onnxruntime": "ONNX Runtime, CPU",
    "openvino": "OpenVINO",
    "onnxruntime-cuda": "ONNX Runtime, CUDA",
    "onnxruntime-node": "onnxruntime-node",
    "onnxruntime-web": "onnxruntime-web, wasm in Node",
}
INSTEAD = {
    "onnxslim": "nothing to gain: `export` writes optimized graphs",
    "onnxsim": "nothing to gain: `export` writes optimized graphs",
    "version converter, opset 20 to 21": "",
    "version converter, opset 20 to 17": '`layout="stages"`, whose files it converts',
    "quantize_dynamic": '[`precision="int8"`](int8.md)',
    "float16": '`precision="fp16"`',
    "float16, keep_io_types=True": '`precision="fp16"`',
}


def runtimes():
    found = results("runtimes")
    rows = [(NAMES[r["runtime"]], r["version"], f"tested by `{r['program']}`", r) for r in found["rows"]]
    known = {r["runtime"] for r in found["rows"]}
    rows += [(name, "", "untested", {"agree": {}}) for key, name in NAMES.items() if key not in known]
    rows += [("browsers", "", "untested", {"agree": {}})]
    lines = [f"| runtime | | {' | '.join(LAYOUTS.values())} |", f"|---|---|{'---|' * len(LAYOUTS)}"]
    for name, version, program, row in rows:
        cells = " | ".join(_cell(row, layout) for layout in LAYOUTS)
        lines.append(f"| {f'{name} {version}'.strip()} | {program} | {cells} |")
    return [*lines, "", f"Made by `{found['command']}`, with {found['environment']['processor']}."]


def _cell(row, layout):
    if layout not in row["agree"]:
        return "untested"
    if not row["agree"][layout]:
        return "wrong answers"
    return "tested, thresholds of the file only" if layout in row.get("own_thresholds", ()) else "tested"


def tools():
    found = results("runtimes")["tools"]
    shown = {layout: name for layout, name in LAYOUTS.items() if layout in next(iter(found.values()))["layouts"]}
    lines = [f"| tool | {' | '.join(shown.values())} | instead |", f"|---|{'---|' * len(shown)}---|"]
    for tool, about in found.items():
        cells = " | ".join(_outcome(about["layouts"][layout]) for layout in shown)
        lines.append(f"| {tool} ({about['version']}) | {cells} | {INSTEAD[tool]} |")
    return [*lines, "", "Tested by `tests/runtimes/test_tools.py`, at the versions in parentheses."]


def _outcome(found):
    text = found["result"]
    if text in ("other numbers", "other answers"):
        text = "runs, " + ("other labels or exits" if text == "other answers" else "same labels and exits")
        text += f"; numbers differ by {found['difference']:.1g}"
    return text + ("; the thresholds become constants" if found.get("thresholds") == "constants" else "")


RUNTIMES = {"runtimes": runtimes, "tools": tools}
