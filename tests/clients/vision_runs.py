"""Tiny loops with timm and diffusers as their own scripts have them, and the table's rows of both.

python tests/clients/vision_runs.py
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_runs import SAVED, STEPS, far
from torch import Tensor, nn

from apollo_optim import RuleOptimizer, build_optimizer, release, rule_of
from apollo_optim.integrations.bare import ApolloMini

try:
    import_module("torchvision")
except RuntimeError:  # Python's package is built for CUDA: beside a torch without it its import misses two operators
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):  # which timm does not call
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

Tensors = dict[str, Tensor]
TORCH_ADAMW = "adamw"
BATCH = 8


def seeded(number: int) -> torch.Generator:
    """Of a step: its batch is the same in every run."""
    return torch.Generator().manual_seed(number)


def timm_train(
    out: Path, opt: str = "apollomini", *, resume: Path | None = None, parts: int = 1, steps: int = STEPS
) -> tuple[Tensors, Any]:
    """timm's registry, schedule and saver on a ViT of 2 layers; on from a checkpoint of its saver."""
    import timm
    from timm.models import resume_checkpoint
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver

    # (Of a name with an underscore timm takes the last part, and the others for wrappers such as lookahead.)
    if "apollomini" not in default_registry.list_optimizers():
        default_registry.register(OptimInfo(name="apollomini", opt_class=ApolloMini, description="APOLLO-Mini"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)
    optimizer: Any = create_optimizer_v2(model, opt=opt, lr=1e-2, weight_decay=0.1)
    schedule = CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-4, lr_min=1e-4)
    out.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(out), recovery_dir=str(out), max_history=99)
    first = 0 if resume is None else resume_checkpoint(model, str(resume), optimizer, log_info=False)
    schedule.step(first)
    model.train()
    for step in range(first or 0, steps):
        pictures = torch.randn(BATCH, 3, 32, 32, generator=seeded(step))
        kinds = torch.randint(4, (BATCH,), generator=seeded(step))
        optimizer.zero_grad()
        for part in range(parts):
            own = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
            (nn.functional.cross_entropy(model(pictures[own]), kinds[own]) / parts).backward()
        optimizer.step()
        schedule.step(step + 1)
        saver.save_checkpoint(step, metric=step)
    return tensors(model, optimizer), (model, optimizer)


def diffusers_train(
    out: Path,
    name: str = "apollo-mini",
    *,
    kind: str = "UNet2DModel",
    released: bool = False,
    resume: Path | None = None,
    parts: int = 1,
    steps: int = STEPS,
) -> tuple[Tensors, Any]:
    """The loop of diffusers' own unconditional example: noise, its schedule, its model; or on from what was saved."""
    import diffusers
    from diffusers.optimization import get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    sizes: dict[str, dict[str, Any]] = {
        "UNet2DModel": {
            "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 8,
            "block_out_channels": (16, 32), "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        "DiTTransformer2DModel": {
            "sample_size": 8, "in_channels": 3, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 1, "patch_size": 2,
        },
    }  # fmt: skip
    made = getattr(diffusers, kind)
    model: Any = made(**sizes[kind]) if resume is None else made.from_pretrained(resume)
    model.eval()  # else DiT drops labels by chance, other ones of a part than of the whole batch
    torch_adamw = name == TORCH_ADAMW
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3) if torch_adamw else None
    if optimizer is None:
        optimizer = build_optimizer(name, model, lr=1e-2, weight_decay=0.1, targets="all-linear")
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, STEPS + 1)
    noise = diffusers.DDPMScheduler(num_train_timesteps=100)
    if resume is not None:
        saved = torch.load(resume / "training.pt", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    handle = release(model, optimizer) if released else None
    for step in range(0 if resume is None else SAVED, steps):
        clean, added = (torch.randn(BATCH, 3, 8, 8, generator=seeded(2 * step + i)) for i in range(2))
        when = torch.randint(100, (BATCH,), generator=seeded(step))
        words = {"class_labels": when % 10} if kind.startswith("DiT") else {}
        noisy: Tensor = noise.add_noise(clean, added, when)
        for part in range(parts):
            own = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
            told = model(noisy[own], when[own], **{key: value[own] for key, value in words.items()}).sample
            (nn.functional.mse_loss(told, added[own]) / parts).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == SAVED and resume is None:
            model.save_pretrained(out)
            torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, out / "training.pt")
    if handle is not None:
        handle.remove()
    return tensors(model, optimizer), (model, optimizer)


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Weights and state."""
    state = optimizer.state_dict()["state"]
    found = dict(model.state_dict()) | {f"{i}.{key}": value for i, one in state.items() for key, value in one.items()}
    return {key: torch.as_tensor(value).detach().clone() for key, value in found.items()}


def followed(run: tuple[Tensors, Any], linear: Callable[[str], bool]) -> str:
    """How many of the matrices that have such a name use APOLLO-Mini, by the optimizer's type and their state."""
    model, optimizer = run[1]
    assert isinstance(optimizer, RuleOptimizer)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and linear(name)}
    ruled = [p for p in matrices.values() if rule_of(p, optimizer.locate(p)[0]) == "apollo-mini"]
    assert all("prev_norm" in optimizer.state[p] for p in ruled)
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS}
    return f"{len(ruled)} of {len(matrices)}"


def accumulated(train: Callable[..., tuple[Tensors, Any]], out: Path) -> float:
    """Four micro-batches against the whole batch at once, as a share of the way that the weights went."""
    start, once, parts = (
        train(out / word, **how)[0]
        for word, how in (("start", {"steps": 0}), ("once", {"steps": 3}), ("parts", {"steps": 3, "parts": 4}))
    )
    names = start.keys()  # (no state yet)
    return far({n: once[n] for n in names}, {n: parts[n] for n in names}) / far(start, {n: once[n] for n in names})


def timm_row(out: Path) -> dict[str, Any]:
    """Of the table."""
    full, adamw = timm_train(out / "full"), timm_train(out / "adamw", TORCH_ADAMW)
    saved = f"checkpoint-{SAVED - 1}.pth.tar"
    return {
        "client": f"timm {version('timm')}",
        "case": "ViT, float32, bare.ApolloMini",
        "follows": followed(full, lambda name: ".attn." in name or ".mlp." in name),
        "accumulated": accumulated(timm_train, out),
        "resumed": far(full[0], timm_train(out / "again", resume=out / "full" / saved)[0]),
        "adamw": far(adamw[0], timm_train(out / "adamw-again", TORCH_ADAMW, resume=out / "adamw" / saved)[0]),
    }


def diffusers_row(out: Path, kind: str) -> dict[str, Any]:
    """Of the table."""
    train = partial(diffusers_train, kind=kind)
    full, adamw = train(out / "full"), train(out / "adamw", TORCH_ADAMW)
    return {
        "client": f"diffusers {version('diffusers')}",
        "case": f"{kind}, float32, apollo-mini",
        "follows": followed(full, lambda name: "embedding_table" not in name),
        "accumulated": accumulated(train, out),
        "release": far(full[0], train(out / "released", released=True)[0]),
        "resumed": far(full[0], train(out / "again", resume=out / "full")[0]),
        "resumed_released": far(full[0], train(out / "both", resume=out / "full", released=True)[0]),
        "adamw": far(adamw[0], train(out / "adamw-again", TORCH_ADAMW, resume=out / "adamw")[0]),
    }


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """Of the table."""
    yield timm_row(out / "timm")
    for kind in ("UNet2DModel", "DiTTransformer2DModel"):
        yield diffusers_row(out / kind, kind)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
