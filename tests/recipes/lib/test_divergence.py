"""A training that diverges stops, names the first bad loss, and the way back."""

import pytest
import torch
from helpers.recipes import run_train

from timm_autoslim.recipes.lib.divergence import NotFiniteError, check_losses


@pytest.mark.slow
def test_a_diverged_training_stops_and_names_the_way_back(tmp_path):
    start = r"The loss is not finite at step 1 \(epoch 1 of 1\): widest_loss is nan of the widest subnet\."
    with pytest.raises(NotFiniteError, match=start + " There is no checkpoint yet: lower --lr"):
        run_train(tmp_path, "broken", lr=1e30)
    # One update an epoch: its loss is computed before it ruins the weights, so the weights are checked too.
    good = run_train(tmp_path, "good", batch_size=128)
    (good / "supernet.safetensors").unlink()
    path = good / "checkpoints" / "update-00000001"
    message = rf"not finite at step 2 \(epoch 2 of 2\), .* is {path}: lower --lr, .* and --resume from it"
    with pytest.raises(NotFiniteError, match=message):
        run_train(tmp_path, "good", "--resume", "--lr", "1e38", "--weight-decay", "1e6", epochs=2, batch_size=128)
    assert list((good / "checkpoints").iterdir()) == [path]
    run_train(tmp_path, "good", "--resume", epochs=2, batch_size=128)
    with pytest.raises(FloatingPointError, match="not finite"):  # an ordinary run's handlers catch it too
        run_train(tmp_path, "again", lr=1e30)


def test_the_first_bad_loss_is_named():
    losses = [{"widest_loss": torch.tensor(1.0), "random_loss": torch.tensor([1.0, 2.0])} for _ in range(3)]
    losses[1]["random_loss"][1] = float("inf")
    losses[2]["widest_loss"] = torch.tensor(float("nan"))
    with pytest.raises(NotFiniteError, match=r"at step 8 \(epoch 3\): random_loss is inf of random_loss, 1, 8\."):
        check_losses(list(enumerate(losses, 7)), "epoch 3", lambda *what: ", ".join(map(str, what)))
    check_losses(list(enumerate(losses[:1])), "epoch 3", None)
