"""Lazy logits against the logits of the same layer: equal losses and gradients, formed when they must be, not before.

`pair()` makes two equal models, a lazy one and a plain one; a use of logits is a function of them that is run on both.
Tolerance: 1e-5 of the largest value in fp32, where the only difference is the order of sums.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.kernels.deferred import Deferred
from lorica.kernels.lazy_logits import LazyGradient, LazyLogits
from lorica.ops.linear_cross_entropy import LazyHead, LinearCrossEntropy
from tests.huggingface_models import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, CLASSES, SHAPE = 8, 37, (2, 6)
Use = Callable[[Tensor], Any]


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A head; the same one on every call."""
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES, bias=bias, device=DEVICE, dtype=dtype)


def pair(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """A lazy head and its plain equal."""
    return LazyHead.attach(layer(bias, dtype)), layer(bias, dtype)


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states [2, 6, 8] that require a gradient."""
    torch.manual_seed(1)
    return torch.randn(*SHAPE, WIDTH, device=DEVICE, dtype=dtype, requires_grad=True)


def targets() -> Tensor:
    """Classes [2, 6], some of them ignored."""
    classes = torch.arange(12, device=DEVICE).view(SHAPE) * 3
    classes[0, 2] = -100
    return classes


def gradients(head: nn.Linear, use: Use, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """What the use makes of the head's logits, the gradients of its sum, and the logits themselves."""
    logits = head(x)
    result = use(logits)
    found = torch.autograd.grad(result.sum(), [x, *head.parameters()])
    return result.detach(), list(found), logits


def are_close(found: Any, wanted: Any) -> None:
    """Assert equality up to the order of sums; see the file's first lines."""
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        size = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * size)


def is_same_use(use: Use, *, formed: bool, bias: bool = True) -> None:
    """Assert that a use of lazy logits is that use of logits, and whether it formed them."""
    lazy, plain = pair(bias)
    result, found, logits = gradients(lazy, use, hidden())
    wanted_result, wanted, _ = gradients(plain, use, hidden())
    are_close([result, *found], [wanted_result, *wanted])
    assert isinstance(logits, LazyLogits) and logits.is_formed == formed


# What they look like --------------------------------------------------------------------------------------------------


def test_lazy_logits_look_like_logits() -> None:
    lazy, plain = pair()
    found, wanted = lazy(hidden()), plain(hidden())
    assert isinstance(found, Tensor) and torch.is_tensor(found)
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "is_cuda"):
        assert getattr(found, name) == getattr(wanted, name), name
    for name in ("size", "stride", "dim", "numel", "is_contiguous", "is_floating_point", "element_size", "__len__"):
        assert getattr(found, name)() == getattr(wanted, name)(), name
    assert found.grad_fn is not None and not found.is_formed


def test_a_view_of_lazy_logits_looks_like_a_view_of_logits() -> None:
    lazy, plain = pair()
    found, wanted = lazy(hidden()), plain(hidden())
    for view in (lambda x: x[..., :-1, :], lambda x: x[:, 1], lambda x: x.view(-1, CLASSES), lambda x: x[1, 2]):
        assert view(found).shape == view(wanted).shape and view(found).stride() == view(wanted).stride()
        assert isinstance(view(found), LazyLogits)
    with pytest.raises(RuntimeError, match=r"view|stride"):
        found[..., :-1, :].view(-1, CLASSES)  # as torch has it
    with pytest.raises(IndexError):
        found[:, 6]
    assert not found.is_formed


# Losses that need no logits -------------------------------------------------------------------------------------------


def shifted(logits: Tensor) -> Tensor:
    """The older way of Hugging Face: drop the last position, copy, flatten."""
    rows = logits[..., :-1, :].contiguous()
    return F.cross_entropy(rows.view(-1, rows.size(-1)), targets()[..., 1:].reshape(-1))


def upcast(logits: Tensor) -> Tensor:
    """The newer way: cast, flatten, ignore the last position."""
    labels = F.pad(targets(), (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, CLASSES), labels.view(-1), ignore_index=-100, reduction="mean")


def plainly(logits: Tensor) -> Tensor:
    """The loss of flattened logits."""
    return F.cross_entropy(logits.view(-1, CLASSES), targets().view(-1))


def module(logits: Tensor) -> Tensor:
    """By a module, with everything that it can do to class indices."""
    loss = nn.CrossEntropyLoss(ignore_index=3, reduction="none", label_smoothing=0.2)
    return loss(logits.flatten(0, 1), targets().clamp_min(0).flatten()) * torch.arange(12, device=DEVICE)


LAZY_USES: list[Use] = [
    shifted,
    upcast,
    module,
    lambda logits: F.cross_entropy(logits.flatten(0, 1), targets().flatten(), reduction="sum") / 7,
    lambda logits: F.cross_entropy(torch.flatten(logits, 0, -2), targets().flatten(), label_smoothing=0.1),
    lambda logits: F.cross_entropy(logits[:, :-1].reshape(-1, CLASSES), targets()[:, :-1].reshape(-1)),
    lambda logits: F.cross_entropy(torch.reshape(logits, (12, -1)), targets().view(-1)),
    lambda logits: F.cross_entropy(logits[1], targets()[1]),
    lambda logits: F.cross_entropy(logits[1, -2, :], targets()[1, -2]),
    lambda logits: F.cross_entropy(logits[0, 0], targets()[0, 0], reduction="none"),
    lambda logits: F.cross_entropy(logits.view(3, 4, CLASSES)[::2, 1:3, ...].reshape(-1, CLASSES), targets()[0, 2:]),
    lambda logits: F.cross_entropy(logits.view_as(logits).to(torch.float32).view(-1, CLASSES), targets().view(-1)),
    lambda logits: F.cross_entropy(logits.to(DEVICE).contiguous().view(-1, CLASSES), targets().view(-1)),
    lambda logits: F.cross_entropy(logits[0], targets()[0]) + 2 * F.cross_entropy(logits[1, 2:], targets()[1, 2:]),
    lambda logits: F.cross_entropy(logits.view(-1, CLASSES)[:0], targets().view(-1)[:0], reduction="sum"),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("use", LAZY_USES, ids=lambda use: getattr(use, "__name__", "use"))
def test_a_loss_forms_no_logits(use: Use, bias: bool) -> None:
    is_same_use(use, formed=False, bias=bias)


@pytest.mark.parametrize("upcast_first", [True, False])
def test_a_loss_of_bf16_logits_has_the_dtype_of_its_input_and_no_larger_error(upcast_first: bool) -> None:
    def use(logits: Tensor) -> Tensor:
        logits = logits.float() if upcast_first else logits
        return F.cross_entropy(logits.view(-1, CLASSES), targets().view(-1))

    lazy, plain = pair(dtype=torch.bfloat16)
    found, wanted = (gradients(head, use, hidden(torch.bfloat16)) for head in (lazy, plain))
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden(torch.bfloat16), *plain.parameters())]
    exact = F.cross_entropy(F.linear(*leaves).view(-1, CLASSES), targets().view(-1))
    exact_gradients = torch.autograd.grad(exact, leaves)
    assert found[0].dtype == wanted[0].dtype == (torch.float32 if upcast_first else torch.bfloat16)
    unit = torch.finfo(found[0].dtype).eps * exact.item()  # of the loss's own dtype
    assert (found[0] - exact).abs() <= (wanted[0] - exact).abs() + unit
    for one, other, true in zip(found[1], wanted[1], exact_gradients, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        assert (one - true).norm() <= 1.25 * (other - true).norm()


def test_autocast_means_what_it_means_for_a_layer() -> None:
    lazy, plain = pair()
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for head, out in ((lazy, found), (plain, wanted)):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss, grads, logits = gradients(
                head, lambda x: F.cross_entropy(x.view(-1, CLASSES), targets().view(-1)), hidden()
            )
        out += [loss, *grads]
        assert logits.dtype == torch.bfloat16
    assert found[0].dtype == torch.float32
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2 * other.abs().max().item())


def test_a_frozen_head_gets_no_gradient() -> None:
    lazy, _ = pair()
    lazy.requires_grad_(False)
    x = hidden()
    upcast(lazy(x)).backward()
    assert x.grad is not None and lazy.weight.grad is None and lazy.bias.grad is None


def test_frozen_hidden_states_get_no_gradient() -> None:
    lazy, plain = pair()
    for head in (lazy, plain):
        upcast(head(hidden().detach())).backward()
    are_close([lazy.weight.grad, lazy.bias.grad], [plain.weight.grad, plain.bias.grad])


def test_under_no_grad_there_is_only_a_loss() -> None:
    lazy, plain = pair()
    logits = lazy(hidden())
    with torch.no_grad():
        loss, detached = upcast(logits), upcast(logits.detach())
    assert not loss.requires_grad and not logits.is_formed
    are_close([loss, detached], [upcast(plain(hidden())).detach()] * 2)


# Uses that form them --------------------------------------------------------------------------------------------------


def changed_in_place(logits: Tensor) -> Tensor:
    """A masked class, a temperature, and the loss."""
    logits[..., 3] = float("-inf")
    logits.div_(2.0)
    return F.cross_entropy(logits.view(-1, CLASSES), targets().view(-1).masked_fill(targets().view(-1) == 3, 4))


def by_a_custom_function(logits: Tensor) -> Tensor:
    """Somebody else's fused loss, which torch functions do not see."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    return F.cross_entropy(Doubled.apply(logits).view(-1, CLASSES), targets().view(-1))


def as_columns(logits: Tensor) -> Tensor:
    """Classes second, as images have it."""
    return F.cross_entropy(logits.transpose(1, 2), targets())


def by_weighted_classes(logits: Tensor) -> Tensor:
    """Classes that count more or less."""
    weight = torch.linspace(0.5, 2.0, CLASSES, device=DEVICE)
    return F.cross_entropy(logits.view(-1, CLASSES), targets().view(-1), weight=weight)


FORMING_USES: list[Use] = [
    changed_in_place,
    by_a_custom_function,
    as_columns,
    lambda logits: logits.sum(),
    lambda logits: logits[..., 5],
    lambda logits: logits[:, targets()[0] > 5],
    lambda logits: logits[..., None, :],
    lambda logits: logits.view(-1),
    lambda logits: logits.view(2, 3, 2, CLASSES).permute(3, 0, 1, 2),
    lambda logits: torch.cat([logits, logits * 2], 1),
    lambda logits: logits.log_softmax(-1).gather(-1, targets().clamp_min(0).unsqueeze(-1)),
    by_weighted_classes,
    lambda logits: F.cross_entropy(logits.view(-1, CLASSES), torch.full((12, CLASSES), 1 / CLASSES, device=DEVICE)),
    lambda logits: 30 * torch.tanh(logits / 30),
    lambda logits: logits.double(),
    lambda logits: logits.to("cpu", copy=True),
    lambda logits: F.mse_loss(logits, torch.ones(*SHAPE, CLASSES, device=DEVICE)),
    lambda logits: upcast(logits) + 1e-2 * logits.float().logsumexp(-1).square().mean(),
    lambda logits: sum(row.square().sum() for row in logits),
    lambda logits: torch.stack([logits, logits]).amax(0),
]


@pytest.mark.parametrize("use", FORMING_USES, ids=lambda use: getattr(use, "__name__", "use"))
def test_any_other_use_is_that_of_the_logits(use: Use) -> None:
    is_same_use(use, formed=True)


READERS: list[Callable[[Tensor], Any]] = [
    lambda logits: logits.detach().cpu().numpy().tolist(),
    lambda logits: logits.tolist(),
    lambda logits: logits[1, 2, 3].item(),
    lambda logits: logits.argmax(-1).tolist(),
    lambda logits: repr(logits.detach()),
    lambda logits: f"{logits[0, 0, 0]:.3f}",
    lambda logits: (logits > 0).tolist(),
    lambda logits: pickle.loads(pickle.dumps(logits)).tolist(),
    lambda logits: copy.deepcopy(logits.detach()).tolist(),
    lambda logits: logits.data.tolist(),
    lambda logits: logits.clone().tolist(),
    lambda logits: logits.untyped_storage().nbytes(),
    lambda logits: float(logits.max()),
    lambda logits: [row.tolist() for row in logits],
]


@pytest.mark.parametrize("read", READERS)
def test_whoever_looks_at_values_sees_those_of_the_logits(read: Callable[[Tensor], Any]) -> None:
    lazy, plain = pair()
    assert read(lazy(hidden())) == read(plain(hidden()))


def test_saved_logits_are_an_ordinary_tensor() -> None:
    lazy, plain = pair()
    file = io.BytesIO()
    torch.save({"logits": lazy(hidden())}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["logits"]
    assert type(loaded) is Tensor
    are_close([loaded.detach()], [plain(hidden()).detach()])


def test_the_values_are_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(1) or linear(*args))
    lazy, _ = pair()
    logits = lazy(hidden())
    flat = logits.view(-1, CLASSES)
    assert not calls
    values = (logits.sum(), flat.sum(), logits.detach().sum(), logits.argmax(), logits.view(-1).sum())
    assert len(calls) == 1 and values[0] == values[1] == values[2]
    assert flat.is_formed and flat.formed().data_ptr() == logits.formed().data_ptr(), "a view shares its values"


def test_a_loss_after_a_look_is_the_same_loss() -> None:
    lazy, plain = pair()
    found, wanted = [], []
    for head, out in ((lazy, found), (plain, wanted)):
        x = hidden()
        logits = head(x)
        accuracy = (logits.argmax(-1) == targets()).float().mean()
        loss = upcast(logits)
        out += [accuracy, loss.detach(), *torch.autograd.grad(loss, [x, *head.parameters()])]
    are_close(found, wanted)


# Hooks and gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["registered before the loss", "registered after it"])
@pytest.mark.parametrize("use", [upcast, shifted, module])
def test_a_hook_sees_the_gradient_of_the_logits(use: Use, before: bool) -> None:
    lazy, plain = pair()
    seen: list[Tensor] = []
    for head in (lazy, plain):
        logits = head(hidden())
        if before:
            logits.register_hook(lambda grad: seen.append(grad.clone()))
        loss = use(logits).sum()
        if not before:
            logits.register_hook(lambda grad: seen.append(grad.clone()))
        (3 * loss).backward()
    are_close(*[[grad] for grad in seen])
    are_close([p.grad for p in lazy.parameters()], [p.grad for p in plain.parameters()])


def test_a_hook_that_looks_at_nothing_forms_nothing() -> None:
    lazy, _ = pair()
    logits, seen = lazy(hidden()), []
    logits.register_hook(seen.append)
    upcast(logits).backward()
    (grad,) = seen
    assert isinstance(grad, LazyGradient) and not grad.is_formed and not logits.is_formed
    assert grad.shape == logits.shape and grad.dtype == logits.dtype


@pytest.mark.parametrize("in_place", [True, False])
def test_a_hook_may_change_the_gradient(in_place: bool) -> None:
    found = []
    for head in pair():
        logits = head(hidden())
        logits.register_hook(lambda grad: grad.mul_(0.5) if in_place else grad * 0.5)
        upcast(logits).backward()
        found.append([p.grad for p in head.parameters()])
    are_close(*found)


def test_gradients_of_logits_can_be_asked_for() -> None:
    found = []
    for head in pair():
        logits = head(hidden())
        rows = logits.float()
        logits.retain_grad()
        upcast(rows).backward(retain_graph=True)
        found.append([logits.grad.clone(), torch.autograd.grad(upcast(rows), logits)[0].clone()])
    are_close(*found)


def test_hooks_of_the_module_fire() -> None:
    found = []
    for head in pair():
        seen: list[Tensor] = []
        head.register_full_backward_hook(lambda module, inputs, outputs, seen=seen: seen.extend((*inputs, *outputs)))
        head.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        upcast(head(hidden())).backward()
        found.append([tensor.clone() for tensor in seen])
        assert len(seen) == 3
    are_close(*found)


def test_a_module_with_backward_hooks_stays_lazy() -> None:
    lazy, _ = pair()
    calls: list[int] = []
    lazy.register_full_backward_hook(lambda *_: calls.append(1))
    logits = lazy(hidden())
    upcast(logits).backward()
    assert isinstance(logits, LazyLogits) and not logits.is_formed and calls == [1]


@pytest.mark.parametrize("retained", [True, False])
def test_two_losses_of_the_same_logits_add_up(retained: bool) -> None:
    found = []
    for head in pair():
        logits = head(hidden())
        first, second = upcast(logits), shifted(logits)
        if retained:
            first.backward(retain_graph=True)
            second.backward()
        else:
            (first + second).backward()
        found.append([p.grad for p in head.parameters()])
        assert not isinstance(logits, LazyLogits) or not logits.is_formed
    are_close(*found)


def test_a_graph_that_is_differentiated_twice_is_refused() -> None:
    lazy, _ = pair()
    x = hidden()
    with pytest.raises(RuntimeError, match=r"once, got create_graph=True.*LazyHead.detach"):
        torch.autograd.grad(upcast(lazy(x)), x, create_graph=True)


def test_formed_logits_can_be_differentiated_twice() -> None:
    found = []
    for head in pair():
        x = hidden()
        (grad,) = torch.autograd.grad(head(x).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *head.parameters()]))
    are_close(*found)


# Promises that cannot be kept -----------------------------------------------------------------------------------------


def change_the_weight(head: nn.Linear, x: Tensor) -> None:
    """An optimizer step."""
    with torch.no_grad():
        head.weight.mul_(2.0)


def change_the_hidden_states(head: nn.Linear, x: Tensor) -> None:
    """An operation in place, behind autograd's back."""
    with torch.no_grad():
        x.mul_(2.0)


def step_an_engine(head: nn.Linear, x: Tensor) -> None:
    """Weights change where autograd does not see it, and the engine says so."""
    assert isinstance(head, LazyHead)
    head.weight.data = head.weight.data * 2
    head.expire()


@pytest.mark.parametrize("change", [change_the_weight, change_the_hidden_states, step_an_engine])
def test_logits_of_another_time_are_refused(change: Callable[[nn.Linear, Tensor], None]) -> None:
    lazy, _ = pair()
    x = hidden()
    logits, looked_at = lazy(x), lazy(x)
    before = looked_at.sum()
    change(lazy, x)
    with pytest.raises(RuntimeError, match=r"changed since.*before the optimizer step"):
        logits.sum()
    with pytest.raises(RuntimeError, match="changed since"):
        upcast(logits)
    assert looked_at.sum() == before, "values that exist stay"


def test_a_view_taken_before_a_change_in_place_is_refused() -> None:
    lazy, _ = pair()
    logits = lazy(hidden())
    rows, copied = logits.view(-1, CLASSES), logits[:, :-1].contiguous()
    before = copied.clone()
    logits[..., 0] = 1e4
    assert logits.max() == 1e4
    with pytest.raises(RuntimeError, match="changed in place"):
        rows.sum()
    with pytest.raises(RuntimeError, match="changed in place"):
        F.cross_entropy(rows, targets().view(-1))
    assert torch.equal(copied, before)


def test_logits_are_refused_after_a_view_was_changed_in_place() -> None:
    lazy, _ = pair()
    logits = lazy(hidden())
    rows = logits.view(-1, CLASSES)
    rows[:, 0] = 1e4
    assert rows.max() == 1e4
    with pytest.raises(RuntimeError, match="changed in place"):
        logits.sum()


def test_a_cast_is_no_view() -> None:
    lazy, plain = pair(dtype=torch.bfloat16)
    found = []
    for head in (lazy, plain):
        logits = head(hidden(torch.bfloat16))
        wide = logits.float()
        logits[..., 0] = 100.0
        found.append([wide.detach(), logits.detach()])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_shapes_do_not_change_in_place() -> None:
    lazy, _ = pair()
    with pytest.raises(NotImplementedError, match="without the underscore"):
        lazy(hidden()).unsqueeze_(0)


# Heads ----------------------------------------------------------------------------------------------------------------


def test_a_head_is_lazy_only_while_it_trains() -> None:
    lazy, plain = pair()
    wanted = plain(hidden()).detach()
    with torch.no_grad():
        found = [lazy(hidden())]
    lazy.eval()
    found += [lazy(hidden())]
    lazy.train().requires_grad_(False)
    found += [lazy(hidden().detach())]
    assert [type(logits) for logits in found] == [Tensor] * 3
    assert all(torch.equal(logits, wanted) for logits in found)


def test_a_head_keeps_all_that_a_module_is() -> None:
    model = nn.Sequential(nn.Linear(4, WIDTH), layer()).to(DEVICE)
    names, state, head = [name for name, _ in model.named_parameters()], model.state_dict(), model[1]
    assert LazyHead.attach(head) is head
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(state) and isinstance(head, nn.Linear)
    assert type(head).__name__ == "Linear", "units may be named by class"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[1], LazyHead) and other[1].weight is not head.weight
        assert isinstance(other(torch.zeros(1, 4, device=DEVICE)), LazyLogits)
    LazyHead.detach(head)
    assert type(head) is nn.Linear and vars(head).keys() == vars(layer()).keys()


def test_only_a_plain_linear_layer_becomes_a_head() -> None:
    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    other = layer()
    other.forward = lambda input: input  # type: ignore[method-assign]
    for module in (Other(2, 2), LazyHead.attach(layer()), nn.Embedding(2, 2), other):
        with pytest.raises(TypeError, match=r"expected a plain torch.nn.Linear"):
            LazyHead.attach(module)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a lazy head"):
        LazyHead.detach(layer())


def test_parameters_are_used_inside_the_context_that_makes_them_whole() -> None:
    entered: list[list[tuple[int, ...]]] = []

    class Whole:
        def __init__(self, params: Any) -> None:
            self.params = params

        def __enter__(self) -> None:
            entered.append([tuple(param.shape) for param in self.params])

        def __exit__(self, *_: object) -> None:
            entered.append([])

    head = LazyHead.attach(layer(), whole=Whole)
    logits = head(hidden())
    assert not entered
    loss = upcast(logits)
    shapes = [(CLASSES, WIDTH), (CLASSES,)]
    assert entered == [shapes, []]
    loss.backward()
    assert entered == [shapes, []], "backward needs no parameter"
    logits.sum()
    assert entered == [shapes, []] * 2


def test_what_does_not_fit_is_refused_as_a_linear_layer_does() -> None:
    lazy, _ = pair()
    for bad in (torch.zeros(2, WIDTH + 1, device=DEVICE), hidden().double()):
        with pytest.raises(RuntimeError):
            lazy(bad)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        F.cross_entropy(lazy(hidden()).view(-1, CLASSES), targets().view(-1)[:-1])


def test_compiled_code_gets_ordinary_logits() -> None:
    lazy, plain = pair()
    compiled = torch.compile(lambda x: upcast(lazy(x)), backend="aot_eager")
    are_close([compiled(hidden()).detach()], [upcast(plain(hidden())).detach()])


def test_compiled_code_may_be_given_lazy_logits() -> None:
    found = []
    compiled = torch.compile(lambda logits: logits.square().mean(), backend="aot_eager")
    for head in pair():
        x = hidden()
        loss = compiled(head(x))
        found.append([loss.detach(), *torch.autograd.grad(loss, [x, *head.parameters()])])
    are_close(*found)


def test_functional_gradients_see_the_logits() -> None:
    found = []
    for head in pair():
        params = dict(head.named_parameters())
        loss = lambda p, head=head: torch.func.functional_call(head, p, hidden().detach()).square().sum()  # noqa: E731
        found.append(list(torch.func.grad(loss)(params).values()))
    are_close(*found)


def test_a_checkpointed_head_stays_lazy() -> None:
    found = []
    for head in pair():
        x = hidden()
        for use_reentrant in (True, False):
            loss = torch.utils.checkpoint.checkpoint(
                lambda x, head=head: upcast(head(x)), x, use_reentrant=use_reentrant
            )
            loss.backward()
        found.append([x.grad, *(p.grad for p in head.parameters())])
    are_close(*found)


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_module_is_a_layer_and_its_loss(reduction: Any) -> None:
    options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 3}
    module = LinearCrossEntropy(WIDTH, CLASSES, bias=True, device=DEVICE, **options)
    plain = layer()
    module.load_state_dict(plain.state_dict())
    x, y = hidden(), targets().clamp_min(0)
    found, wanted = module(x, y), F.cross_entropy(plain(x).view(-1, CLASSES), y.view(-1), **options)
    assert found.shape == (SHAPE if reduction == "none" else ())
    found.sum().backward()
    wanted.sum().backward()
    are_close([found.flatten().detach()], [wanted.flatten().detach()])
    are_close([p.grad for p in module.parameters()], [p.grad for p in plain.parameters()])
    assert torch.equal(module.logits(x), plain(x))


def test_the_logits_of_a_capped_module_are_capped() -> None:
    module = LinearCrossEntropy(WIDTH, CLASSES, softcap=0.5, device=DEVICE)
    x, y = hidden(), targets()
    assert module.logits(x).abs().max() < 0.5
    wanted = F.cross_entropy(module.logits(x).view(-1, CLASSES), y.view(-1))
    are_close([module(x, y).detach()], [wanted.detach()])


# Hugging Face ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every tensor whose values were formed."""
    calls: list[int] = []
    original = Deferred.formed
    monkeypatch.setattr(Deferred, "formed", lambda self: calls.append(1) or original(self))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "llama, tied", "qwen3-moe", "t5", "llama, lora"])
def test_an_unmodified_model_of_hugging_face_has_the_same_loss_and_no_logits(
    family: str, dtype: torch.dtype, formed: list[int]
) -> None:
    found = []
    for lazy in (True, False):
        model: Any = FAMILIES[family].model().to(DEVICE, dtype).train()
        if lazy:
            LazyHead.attach(model.get_output_embeddings())
        batch = {name: value.to(DEVICE) for name, value in FAMILIES[family].batch(0).items()}
        output = model(**batch)
        output.loss.backward()
        found.append((output, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    assert isinstance(found[0][0].logits, LazyLogits) and not formed
    (output, grads), (wanted, wanted_grads) = found
    rounding = 1e-5 if dtype == torch.float32 else 3e-2  # of sums of bf16 products in another order
    one_unit = 2.0**-7 if output.loss.dtype == torch.bfloat16 else rounding / 10  # T5 has its loss in bf16
    torch.testing.assert_close(output.loss, wanted.loss, rtol=one_unit, atol=0)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            assert (grads[name] - grad).norm() <= rounding * grad.norm() + 1e-7, name
    torch.testing.assert_close(output.logits.detach(), wanted.logits.detach(), rtol=1e-5, atol=1e-5)


def test_a_model_of_hugging_face_generates_as_before() -> None:
    model: Any = FAMILIES["llama"].model().to(DEVICE).eval()
    prompt = FAMILIES["llama"].batch(0)["input_ids"][:, :4].to(DEVICE)
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    LazyHead.attach(model.get_output_embeddings())
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)
    assert torch.equal(model.train().generate(prompt, max_new_tokens=6, do_sample=False), wanted)


def test_a_loss_of_the_trainer_is_fused_too(formed: list[int]) -> None:
    """`num_items_in_batch` makes it a sum that is divided."""
    losses = []
    for lazy in (True, False):
        model: Any = FAMILIES["llama"].model().to(DEVICE).train()
        if lazy:
            LazyHead.attach(model.get_output_embeddings())
        batch = {name: value.to(DEVICE) for name, value in FAMILIES["llama"].batch(0).items()}
        losses.append(model(**batch, num_items_in_batch=torch.tensor(50, device=DEVICE)).loss)
    assert not formed
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
