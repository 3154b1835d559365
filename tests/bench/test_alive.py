"""The picture of three runs: drawn from a result file alone, of whatever length its runs have."""

import json

from PIL import Image

from bench.alive import COLUMNS, RUNS, main


def row(name, steps, words):
    columns = {key: [0.5 + 0.1 * n for n in range(steps)] for key in COLUMNS}
    columns |= {"step": [10 * n + 10 for n in range(steps)], "verdict": words}
    columns["loss_ratio"] = [None, *columns["loss_ratio"][1:]]
    figure = {"name": "loss ratio at the end", "value": 1.0, "unit": "", "parameters": {"run": name}}
    return figure | {"verdict": words[-1], "columns": columns}


def test_a_result_file_is_drawn_again(tmp_path):
    rows = [
        row("healthy", 6, ["early"] * 2 + ["position only"] * 2 + ["alive"] * 2),
        row("without momentum", 6, ["early"] * 2 + ["collapsing"] + ["collapsed"] * 3),
        row("learning rate x 1000", 3, ["early", "diverged", "diverged"]),
    ]
    assert [one["parameters"]["run"] for one in rows] == list(RUNS)
    path, picture = tmp_path / "alive.json", tmp_path / "alive.png"
    path.write_text(json.dumps({"rows": rows}))
    main(["--draw", str(path), "--picture", str(picture)])
    colours = Image.open(picture).convert("RGB").getcolors(1 << 20)
    shown = {colour for count, colour in colours if count > 500}
    assert {(223, 242, 223), (248, 211, 211), (233, 218, 243)} <= shown, "alive, collapsed and diverged are shaded"
