"""Made-up compression reports of any size."""

import random

from optimum_dern import DernConfig
from optimum_dern.evaluation.loss.perplexity import TextLoss
from optimum_dern.results.report import CompressionReport, LayerReport, ModelSize


def sample_report(layers=4, experts=8, config=None, evaluated=True, width=64):
    """Make a report with every field filled and half of the experts dropped."""
    draw = random.Random(0)
    config = config or DernConfig(dataset="notes.txt")
    report = CompressionReport(
        source="you/some-moe",
        revision="0123456789abcdef0123456789abcdef01234567",
        model_type="qwen3_moe",
        method="dern",
        config=config.to_dict(),
        calibration={"dataset": "notes.txt", "sha256": "0123456789abcdef" * 4, "sequences": 128, "tokens": 262144},
        before=ModelSize(30_532_122_624, 3_345_000_000, 61_064_245_248, experts),
        after=ModelSize(16_000_000_000, 3_340_000_000, 32_000_000_000, experts // 2),
        layers=[sample_layer(draw, position, experts, width) for position in range(layers)],
        versions={"optimum-dern": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        seconds=4321.5,
        peak_memory_bytes=12 << 30,
    )
    if evaluated:
        names = ("books", "code", "mathematics", "news")
        before = {name: TextLoss(2.5 + 0.2 * i, 0.01, 4000, 2048) for i, name in enumerate(names)}
        after = {name: TextLoss(2.6 + 0.22 * i, 0.01, 4000, 2048) for i, name in enumerate(names)}
        report.add_evaluation(before, after)
    return report


def sample_layer(draw, position, experts, width):
    """Make the report of one layer."""
    saliency = [draw.random() ** 2 for _ in range(experts)]
    ranked = sorted(range(experts), key=lambda expert: -saliency[expert])
    retained, dropped = sorted(ranked[: experts // 2]), sorted(ranked[experts // 2 :])
    moved = [draw.randrange(width) for _ in dropped]
    links = [[d, draw.choice(retained), m] for d, m in zip(dropped, moved, strict=True) if m]
    shown = sorted(draw.sample(range(experts), min(64, experts)))
    cosines = [draw.randrange(-5, 95) for _ in range(len(shown) * (len(shown) - 1) // 2)]
    error = 0.05 + 0.2 * draw.random()
    return LayerReport(
        name=f"model.layers.{position}.mlp",
        layer=position,
        tokens=262144,
        held_out_tokens=26214,
        load=[value / sum(saliency) for value in saliency],
        saliency=saliency,
        retained=retained,
        errors={
            "pruned": 2 * error,
            "pruned+refit": 1.3 * error,
            "recombined": 1.7 * error,
            "recombined+refit": error,
        },
        source_errors={
            name: {"pruned": part * 2 * error, "recombined+refit": part * error}
            for name, part in (("notes.txt", 0.9), ("self", 1.1))
        },
        winner="recombined+refit",
        moved_share=sum(moved) / (width * len(dropped)),
        similarity_quantiles={"0.00": 0.1, "0.50": 0.55, "1.00": 0.97},
        seconds=12.5,
        segment_flow={
            "width": width,
            "moved": moved,
            "received": [sum(link[2] for link in links if link[1] == expert) for expert in retained],
            "links": links,
        },
        similarity_map={
            "experts": shown,
            "cosines": cosines,
            "nearest": [[draw.choice(shown), 80 + i % 15, 15, 40 + i % 30, 92] for i in range(len(shown))],
            "histogram": [draw.randrange(500) for _ in range(20)],
            "neurons": width // 2,
        },
    )
