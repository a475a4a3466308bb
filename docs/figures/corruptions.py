"""Draws docs/assets/corruptions.png: the fifteen corruptions at severities 1, 3 and 5.

    python docs/figures/corruptions.py

The photograph is dany13's flower (CC BY 2.0), which scikit-learn bundles.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from trimtab.data.corruptions import CORRUPTIONS, corrupt

SIDE, GAP, MARGIN, LABEL, COLUMNS = 100, 3, 14, 22, 3
SEVERITIES = (1, 3, 5)
INK = (60, 60, 67)


def main(path=Path(__file__).parents[1] / "assets" / "corruptions.png"):
    picture = Image.fromarray(load_sample_image("flower.jpg")).crop((107, 0, 534, 427))
    picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    font = ImageFont.load_default(size=14)
    card = (len(SEVERITIES) * (SIDE + GAP) - GAP + MARGIN, LABEL + SIDE + MARGIN)
    rows = -(-len(CORRUPTIONS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * card[0] + MARGIN, rows * card[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(CORRUPTIONS):
        left, top = MARGIN + i % COLUMNS * card[0], MARGIN + i // COLUMNS * card[1]
        draw.text((left, top), name.replace("_", " "), fill=INK, font=font)
        for k, severity in enumerate(SEVERITIES):
            out = corrupt(image, name, severity, torch.Generator().manual_seed(4))[0]
            pixels = (out * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (left + k * (SIDE + GAP), top + LABEL))
    # 256 colours and dithering: a third of the bytes, and smooth skies stay smooth
    palette = sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {sheet.size[0]} x {sheet.size[1]}, {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
