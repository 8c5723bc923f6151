"""Capture: what stays whole, what gradients cost, and tracing for a GPU that is not there."""

import ctypes
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.helpers.ahead import Function
from torch_rtx.backend import capture, capture_cache, fake_cuda
from torch_rtx.errors import CaptureError

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


class Block(nn.Module):
    """Conv, BN, attention over slices, tied projections, a tensor attribute, a list of tensors and literal tensors."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.qkv, self.out, self.tied = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.out.weight
        self.register_buffer("shift", torch.full((8,), 0.5), persistent=False)
        self.scale, self.offsets = torch.tensor([2.0]), [torch.arange(8.0)]

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = F.scaled_dot_product_attention(q[:, :4], k, v) * self.scale + self.offsets[0] + self.shift
        y = self.tied(self.out(y)) * torch.tensor([1.0, -1.0] * 4, device=x.device)
        return y[:, torch.tensor([0, 2])]


class Chain(nn.Sequential):
    """Ops that AOTAutograd decomposes unless they are kept."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Upsample(scale_factor=2.0, mode="linear"))

    def forward(self, x):
        return F.scaled_dot_product_attention(*(super().forward(x),) * 3).softmax(-1)


CHAIN_OPS = {"linear", "layer_norm", "rms_norm", "upsample_linear1d", "scaled_dot_product_attention", "softmax"}


def op_names(graph):
    return [n.target.overloadpacket.__name__ for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    return []


@pytest.fixture
def recorder(graphs):
    def compiler(gm, example_inputs):
        graphs.append(gm.graph)
        return gm

    return compiler


def refuse(gm, example_inputs):
    raise AssertionError("captured for training")


@pytest.fixture
def training(recorder):
    return lambda gm, example_inputs: capture.capture(gm, example_inputs, refuse, recorder, recorder)


@pytest.fixture
def inference(recorder):
    return lambda gm, example_inputs: capture.capture(gm, example_inputs, recorder, refuse, refuse)


def held_tensors(model):
    """Every tensor the model holds, by place: to see that the very same objects are there again."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    held |= {"scale": model.scale, "offsets": model.offsets, "offsets[0]": model.offsets[0]}
    return {name: id(value) for name, value in held.items()}


# ---- torch.compile, inference ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_keeps_composite_ops_whole(mode, inference, graphs):
    model, x = Chain(), torch.randn(2, 4, 8)  # parameters that require grad do not matter under no_grad
    with mode():
        torch.testing.assert_close(torch.compile(model, backend=inference, fullgraph=True)(x), model(x))
    assert set(op_names(graphs[0])) == CHAIN_OPS


def test_keep_ops_ends_with_the_context(inference, recorder, graphs):
    model, x = Chain(), torch.randn(2, 4, 8)
    with torch.no_grad():
        torch.compile(model, backend=inference)(x)
        torch._dynamo.reset()
        torch.compile(model, backend=aot_autograd(fw_compiler=recorder))(x)
    assert "linear" in op_names(graphs[0])
    assert "linear" not in op_names(graphs[1])


def test_keep_ops_leaves_the_operators_as_they_were():
    def tables():
        return {op: (dict(op.py_kernels), op_implementations_dict.get(op)) for op in capture.KEEP}

    before = tables()
    for _ in range(2):
        with capture.keep_ops():
            assert all(tables()[op] != before[op] for op in capture.KEEP)
        assert tables() == before


def test_keep_ops_that_is_interrupted_leaves_the_operators_as_they_were(monkeypatch):
    class Interrupted(dict):
        def items(self):
            yield next(iter(super().items()))
            raise KeyboardInterrupt

    before = capture._tables()
    tables = Interrupted(capture._overridden())
    monkeypatch.setattr(capture, "_overridden", lambda: tables)
    with pytest.raises(KeyboardInterrupt), capture.keep_ops():
        pass
    assert capture._tables() == before


def test_mutated_input_is_a_trailing_copy(inference, graphs):
    def step(cache, x):
        cache.add_(x)
        return cache * 2

    cache, x = torch.zeros(4), torch.randn(4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=inference)(cache, x), x * 2)
    torch.testing.assert_close(cache, x)
    assert op_names(graphs[0])[-1] == "copy_"


def test_dynamic_shapes_reach_the_compiler(inference, graphs):
    model = torch.compile(nn.Linear(8, 8), backend=inference, dynamic=True)
    with torch.no_grad():
        assert model(torch.randn(3, 8)).shape == (3, 8)
        assert model(torch.randn(5, 8)).shape == (5, 8)
    assert len(graphs) == 1


# ---- torch.compile, training ----


def test_needs_autograd():
    weight = nn.Parameter(torch.ones(2))
    assert capture_cache._needs_autograd([3, weight])
    assert not capture_cache._needs_autograd([3, weight.detach()])
    with torch.no_grad():
        assert not capture_cache._needs_autograd([weight])


def gradients(model, x):
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_training_gradients_are_those_of_eager(training, graphs):
    model, x = Chain(), torch.randn(2, 4, 8)
    expected = gradients(model, x)
    model.zero_grad()
    actual = gradients(torch.compile(model, backend=training, fullgraph=True), x)
    torch.testing.assert_close(list(actual.values()), list(expected.values()))
    assert len(graphs) == 2
    assert not CHAIN_OPS & {*op_names(graphs[0]), *op_names(graphs[1])}


def test_what_needs_no_gradient_stays_whole_in_training(training, graphs):
    model, head, x = Chain().requires_grad_(False), nn.Linear(16, 8), torch.randn(2, 4, 8)
    torch.compile(lambda x: head(model(x).mean(1)), backend=training, fullgraph=True)(x).sum().backward()
    assert CHAIN_OPS - set(op_names(graphs[0])) == set()


# ---- ahead of time ----


def test_export_takes_composites_of_libraries_apart():
    with torch.library._scoped_library("rtx_test_capture", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
        program = capture.capture_export(Function(lambda x: torch.ops.rtx_test_capture.twice(x)), (torch.ones(3),))
    assert op_names(program.graph) == ["add"]


def test_export_has_the_ops_of_torch_compile(inference, graphs):
    model, x = Block().eval(), torch.randn(2, 3, 6, 6)
    program = capture.capture_export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
        torch.compile(model, backend=inference, fullgraph=True)(x)
    # They differ only in how constants are copied before use.
    copies = ("clone", "lift_fresh_copy", "_to_copy")
    exported, compiled = (Counter(n for n in op_names(g) if n not in copies) for g in (program.graph, graphs[0]))
    assert exported == compiled
    assert {"linear", "layer_norm", "scaled_dot_product_attention", "conv2d"} <= set(exported)


def test_export_leaves_out_assertions_and_grad_mode():
    class Cast(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x.to(torch.float64).to(torch.float32))

    program = capture.capture_export(Cast(2, 2), (torch.randn(2, 2),))
    assert Counter(op_names(program.graph)) == {"_to_copy": 2, "linear": 1}


@needs_no_gpu
def test_fake_cuda_export():
    model, x = Block().eval(), torch.randn(2, 3, 6, 6)
    held = held_tensors(model)
    program = capture.capture_export(model, (x,), device="cuda")
    assert held_tensors(model) == held
    assert model.tied.weight is model.out.weight
    (out,) = program.graph.output_node().args[0]
    assert out.meta["val"].device == torch.device("cuda:0")
    assert out.meta["val"].shape == (2, 2, 8)
    # The data is the model's own: weights and attributes are the same objects, literals are real tensors on the CPU.
    assert all(program.state_dict[name] is value for name, value in model.state_dict(keep_vars=True).items())
    assert program.constants["shift"] is model.shift
    assert program.constants["scale"] is model.scale
    assert not any(isinstance(value, FakeTensor) for value in program.constants.values())
    literals = [value.tolist() for value in program.constants.values()]
    assert [1.0, -1.0] * 4 in literals
    assert [0, 2] in literals
    assert model.offsets[0].tolist() in literals
    # Export lists both names of a tied weight, and uses one.
    names = ("p_out_weight", "p_tied_weight")
    users = [len(n.users) for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    assert sorted(users) == [0, 2]
    assert program.state_dict["out.weight"] is program.state_dict["tied.weight"]


@needs_no_gpu
def test_fake_cuda_graph_computes_what_the_model_computes():
    """Retargeted back to the CPU, node by node, the captured graph gives the model's results."""
    model, x = Block().eval(), torch.randn(2, 3, 6, 6)
    program = capture.capture_export(model, (x,), device="cuda")
    for node in program.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    data, signature = program.state_dict | program.constants, program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
    inputs = [data[names[n.name]] if n.name in names else x for n in program.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        (actual,) = torch.fx.Interpreter(program.graph_module).run(*inputs)
        torch.testing.assert_close(actual, model(x))


@needs_no_gpu
def test_failing_export_restores_the_model():
    class Branch(Block):
        def forward(self, x):
            return x if super().forward(x).sum() > 0 else -x

    model = Branch().eval()
    held = held_tensors(model)
    with pytest.raises(Exception, match="(?i)data-dependent"):
        capture.capture_export(model, (torch.randn(2, 3, 6, 6),), device="cuda")
    assert held_tensors(model) == held


@needs_no_gpu
@pytest.mark.parametrize("home", [torch.device("meta"), FakeTensorMode()], ids=["meta", "fake"])
def test_models_without_data(home):
    with home:
        model = nn.Sequential(nn.Linear(4096, 4096, dtype=torch.float16), nn.LayerNorm(4096, dtype=torch.float16))
    x = torch.zeros(2, 4096, dtype=torch.float16)
    program = capture.capture_export(model, (x,), device="cuda")
    assert op_names(program.graph) == ["linear", "layer_norm"]
    assert program.state_dict["0.weight"] is model[0].weight
    if not isinstance(home, torch.device):  # a fake model says itself where it is
        assert op_names(capture.capture_export(model, (x,)).graph) == ["linear", "layer_norm"]


@needs_no_gpu
def test_lists_of_parameters_are_replaced_too():
    lstm = nn.LSTM(4, 8, batch_first=True)
    program = capture.capture_export(lstm, (torch.randn(2, 5, 4),), device="cuda")
    assert "lstm" in op_names(program.graph)
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))


@needs_no_gpu
def test_dynamic_shapes():
    batch = torch.export.Dim("batch", min=2, max=16)
    x = torch.randn(4, 3, 6, 6)
    program = capture.capture_export(Block().eval(), (x,), device="cuda", dynamic_shapes={"x": {0: batch}})
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (2, 16)
    assert isinstance(program.graph.output_node().args[0][0].meta["val"].shape[0], torch.SymInt)


def test_exported_program_is_taken_as_it_is():
    model, x = Chain(), torch.randn(2, 4, 8)
    exported = torch.export.export(model, (x,))
    program = capture.capture_export(exported)
    assert set(op_names(program.graph)) == CHAIN_OPS
    assert capture.capture_export(program) is program
    with pytest.raises(CaptureError, match="already traced"):
        capture.capture_export(exported, (x,))
    with pytest.raises(CaptureError, match="traced on cpu.*cuda"):
        capture.capture_export(exported, device="cuda")


def test_arguments_that_do_not_fit():
    with pytest.raises(CaptureError, match="cannot export a function"):
        capture.capture_export(lambda x: x, (1,))
    with pytest.raises(CaptureError, match="args must be a tuple.*Tensor"):
        capture.capture_export(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(CaptureError, match="sparse"):
        capture.capture_export(nn.Linear(2, 2), (torch.eye(2).to_sparse(),), device="cpu")
    for model, device in ((nn.Linear(2, 2), "meta"), (nn.Linear(2, 2, device="meta"), None)):
        with pytest.raises(CaptureError, match="meta device\n.*device='cuda'"):
            capture.capture_export(model, (torch.randn(2, 2),), device=device)


# ---- the device guard ----


@needs_no_gpu
def test_guard_leaves_cpu_training_alone():
    fake_cuda.install_cuda_guard()
    fake_cuda.install_cuda_guard()
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


SCALARS = {
    "used": lambda x: x + torch.tensor(2.0, device=x.device) * 3,
    "moved": lambda x: x + torch.tensor(2.0).to(x.device, torch.float64),
    "like": lambda x: x + torch.full_like(torch.tensor(3.0), 2.0, device=x.device),
    "empty": lambda x: torch.cat((x, torch.tensor([], device=x.device))),
    "read": lambda x: x[: torch.tensor(2, device=x.device)] * torch.tensor(3.0, device=x.device).item(),
    "asked": lambda x: x if torch.tensor(True, device=x.device) else -x,
}


@needs_no_gpu
@pytest.mark.parametrize("name", SCALARS)
def test_scalar_constants_on_a_gpu_that_is_not_there(name):
    """Their values are carried along by the trace, which moves them to the GPU as the model does."""
    x, function = torch.randn(4), SCALARS[name]
    program = capture.capture_export(Function(function), (x,), device="cuda")
    results = program.graph.output_node().args[0]
    assert {result.meta["val"].device.type for result in results} == {"cuda"}
    again = capture.capture_export(program, device="cuda")  # its constants are on the CPU, the rest is not
    assert op_names(again.graph) == op_names(program.graph)
    for device in ("cpu", "meta"):
        with pytest.raises(CaptureError, match="cannot be moved"):
            capture.capture_export(program, device=device)
    with pytest.raises((AssertionError, RuntimeError)):  # nothing is left behind
        torch.ones(1).to("cuda")


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a CUDA build brings its own guard")
def test_guard_that_cannot_be_installed(monkeypatch):
    monkeypatch.setattr(fake_cuda, "_REGISTRY", "no_such_symbol")
    with pytest.raises(CaptureError, match="no device guard registry.*\n.*capture on the CPU"):
        capture.capture_export(nn.Linear(2, 2), (torch.randn(2, 2),), device="cuda")
    monkeypatch.setattr(fake_cuda.sys, "platform", "win32")
    with pytest.raises(CaptureError, match="need Linux"):
        fake_cuda.install_cuda_guard()


def test_guard_registry_is_checked_before_it_is_used():
    text = ctypes.create_string_buffer(b"not a C++ object", 64)
    for guard in (0, 8, ctypes.addressof(text)):  # empty, unmapped, mapped but no object
        with pytest.raises(CaptureError, match="device guard registry"):
            fake_cuda._check_guard(guard)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", ["nothing", "keys", "scores"])
def test_the_fast_path_of_encoder_layers(norm_first, activation, masked, inference, graphs):
    """Dynamo has one operator for a whole layer in inference."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first, activation=activation)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    model, x, options = layer.eval(), torch.randn(2, 5, 16), {}
    if masked == "keys":
        options["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    if masked == "scores":
        options["src_mask"] = torch.rand(5, 5).fill_diagonal_(0) > 0.6
    with torch.no_grad():
        expected = model(x, **options)
        torch.testing.assert_close(torch.compile(model, backend=inference, fullgraph=True)(x, **options), expected)
    found = op_names(graphs[0])
    assert {"linear", "layer_norm", "scaled_dot_product_attention"} <= set(found)
    assert "_transformer_encoder_layer_fwd" not in found


def test_an_export_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    """Least of all of PyTorch's own code."""
    capture.capture_export(nn.Linear(4, 4), (torch.ones(2, 4),))
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []
