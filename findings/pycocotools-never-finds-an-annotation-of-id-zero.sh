#!/usr/bin/env bash
# pycocotools 2.0.11: a perfect detection of the annotation whose id is 0 counts as a miss and as a false alarm.
#
# Its evaluation notes for each detection the id of the truth that it took, and for each truth the id of its detection; 0
# in these notes means "none". Ids of detections begin at 1. Those of truths are the user's, and a list that is numbered
# from 0, as one would write it, is valid: nothing is said. So average precision drops by the first object of the data
# set: from 1 to 0 where it is the only one, to 0.25 where it is one of two in one picture and is found at the higher
# score. What is written for such a file with ids from 1 on is right, and so is an evaluation that keeps a flag.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.4.6
cat > "$work/look.py" <<'PY'
import contextlib
import importlib.metadata
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

print("pycocotools", importlib.metadata.version("pycocotools"))


def precision(count, first):
    """AP of perfect detections, the first one the surest, of `count` objects whose ids go up from `first`."""
    boxes = [[10.0 + 60 * i, 10.0, 50.0, 50.0] for i in range(count)]
    truth, found = COCO(), None
    truth.dataset = {"images": [{"id": 1, "width": 400, "height": 400}], "categories": [{"id": 1, "name": "thing"}]}
    rows = [{"bbox": box, "area": 2500.0, "image_id": 1, "category_id": 1, "iscrowd": 0} for box in boxes]
    truth.dataset["annotations"] = [row | {"id": first + i} for i, row in enumerate(rows)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9 - i / 10} for i, box in enumerate(boxes)]
        judge = COCOeval(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    print(f"{count} object(s), ids from {first}, all found exactly: AP {judge.stats[0]:.4f}")
    return judge.stats[0]


for count, expected in ((1, 0.0), (2, 0.2525), (4, None)):
    assert abs(precision(count, 1) - 1) < 1e-9
    value = precision(count, 0)
    assert value < 0.8 and (expected is None or abs(value - expected) < 1e-3), value
PY
"$work/env/bin/python" "$work/look.py"
