#!/usr/bin/env bash
# Makes the pictures of the README and of docs/ from a run: docs/make_pictures.sh [RUN] (default: runs/demo, see `make
# demo`; those in the repository are of builtin, which has no course to plot). Needs the extras tools and viewer; the
# viewer's picture also playwright and chromium, and is left alone without them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${1:-runs/demo}
python=${PYTHON:-python}

"$python" -m epigraf_fast render grid "$run" --out docs/render.png --seeds 0-5 --columns 6 --truncation 0.9 \
    --show rgb depth normals --overwrite
"$python" -m epigraf_fast render turntable "$run" --out docs/turntable.gif --seeds 0-5 --columns 6 --truncation 0.9 \
    --resolution 128 --frames 24 --fps 10 --overwrite
"$python" -m epigraf_fast mesh "$run" --out docs/mesh.png --seeds 3 --resolution 160 --truncation 0.9 --largest \
    --overwrite
if [ "$run" != builtin ]; then
    "$python" -m epigraf_fast metrics "$run" --images 200 --plot docs/metrics.png --overwrite
fi
"$python" -m epigraf_fast data check builtin --preset demo --plot docs/poses.png --overwrite
"$python" docs/viewer_screenshot.py "$run" docs/viewer.png
"$python" docs/region_figure.py  # docs/region.png
