"""Lightning's Trainer with optimizers of ours, and with the step inside backward."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning", reason="make test-clients has an environment with it")
from lightning_runs import RELEASED, SAVED, TORCH_ADAMW, difference, followed, train

from apollo_optim import InputError
from apollo_optim.integrations.lightning import ReleaseCallback


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_trains_accumulates_releases_and_resumes_bitwise(tmp_path, dtype):
    """The last step of an epoch has three micro-batches; one layer has no gradient in any step's last one."""
    full = train(tmp_path / "full", dtype=dtype)
    assert followed(full, "apollo-mini") == "4 of 4"
    released = train(tmp_path / "released", dtype=dtype, callbacks=RELEASED)
    assert difference(full, released) == 0.0
    for callbacks in ((), RELEASED):
        saved = tmp_path / "full" / f"step={SAVED}.ckpt"
        resumed = train(tmp_path / "again", dtype=dtype, callbacks=callbacks, resume=saved)
        assert difference(full, resumed) == 0.0


def test_one_gradient_lives_at_a_time_and_the_hooks_end_with_training(tmp_path):
    most = []

    class Watched(ReleaseCallback):
        def on_after_backward(self, trainer, pl_module):
            most.append(sum(p.grad is not None for p in pl_module.parameters()))

    module, trainer = train(tmp_path, callbacks=(Watched,), accumulate_grad_batches=1, max_epochs=1, max_steps=3)
    assert most == [0, 0, 0]
    module.training_step(torch.zeros(2, 12, dtype=torch.long), 0).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0.5: .* ReleaseCallback\(clip_tensor=0.5\)"),
        ({"name": TORCH_ADAMW}, "AdamW has no step for one parameter"),
    ],
)
def test_what_a_step_inside_backward_cannot_honour(tmp_path, own, said):
    with pytest.raises(InputError, match=said) as error:
        train(tmp_path, callbacks=RELEASED, **own)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("automatic", "scaler", "said"), [(False, None, "automatic_optimization=False"), (True, object(), "GradScaler")]
)
def test_what_needs_other_modules_is_refused(automatic, scaler, said):
    trainer = SimpleNamespace(
        gradient_clip_val=None, precision="16-mixed", precision_plugin=SimpleNamespace(scaler=scaler)
    )
    with pytest.raises(InputError, match=said):
        ReleaseCallback().on_train_start(trainer, SimpleNamespace(automatic_optimization=automatic))
