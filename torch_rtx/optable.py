"""The allow-lists: the overloads that an engine may call, of ATen but for a few. To allow an op is to add its name.

`ALLOWED` is for graphs of this process and of its caches. `FILE_OPS` is for engine files, which may come from anywhere:
it lacks what inference does not need and what PyTorch does not check, the headings in `UNTRUSTED` and the operators of
`TRAINING`. Other headings are for the reader; the code asks the op's own schema and tags. All ops are functional except
those under "effect".
"""

from __future__ import annotations

_NAMES = """
# pointwise: one element of each input gives one element of the output
__lshift__.Scalar __lshift__.Tensor __rshift__.Scalar __rshift__.Tensor _conj_physical.default abs.default acos.default
acosh.default add.Scalar add.Tensor addcdiv.default addcmul.default angle.default asin.default asinh.default
atan.default atan2.default atanh.default bitwise_and.Scalar bitwise_and.Scalar_Tensor bitwise_and.Tensor
bitwise_left_shift.Scalar_Tensor bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_not.default
bitwise_or.Scalar bitwise_or.Scalar_Tensor bitwise_or.Tensor bitwise_right_shift.Scalar_Tensor
bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar bitwise_xor.Scalar_Tensor
bitwise_xor.Tensor ceil.default celu.default clamp.Tensor clamp.default clamp_max.Tensor clamp_max.default
clamp_min.Tensor clamp_min.default clone.default copysign.Scalar copysign.Tensor cos.default cosh.default
deg2rad.default digamma.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode elu.default eq.Scalar eq.Tensor
erf.default erfc.default erfinv.default exp.default exp2.default expm1.default floor.default floor_divide.Scalar
fmax.default fmin.default fmod.Scalar fmod.Tensor frac.default frexp.Tensor gcd.default ge.Scalar ge.Tensor gelu.default
gt.Scalar gt.Tensor hardsigmoid.default hardtanh.default heaviside.default hypot.default i0.default igamma.default
igammac.default isinf.default isnan.default isneginf.default isposinf.default lcm.default le.Scalar le.Tensor
leaky_relu.default lerp.Scalar lerp.Tensor lgamma.default log.default log10.default log1p.default log2.default
logaddexp.default logaddexp2.default logical_and.default logical_not.default logical_or.default logical_xor.default
logit.default lt.Scalar lt.Tensor masked_fill.Scalar maximum.default minimum.default mish.default mul.Scalar mul.Tensor
nan_to_num.default ne.Scalar ne.Tensor neg.default nextafter.default polygamma.default pow.Scalar pow.Tensor_Scalar
pow.Tensor_Tensor rad2deg.default reciprocal.default relu.default relu6.default remainder.Scalar remainder.Scalar_Tensor
remainder.Tensor round.decimals round.default rsqrt.default rsub.Scalar selu.default sgn.default sigmoid.default
sign.default signbit.default silu.default sin.default sinc.default sinh.default softplus.default special_airy_ai.default
special_bessel_j0.default special_bessel_j1.default special_bessel_y0.default special_bessel_y1.default
special_entr.default special_erfcx.default special_i0e.default special_i1.default special_i1e.default
special_log_ndtr.default special_modified_bessel_i0.default special_modified_bessel_i1.default
special_modified_bessel_k0.default special_modified_bessel_k1.default special_ndtri.default
special_scaled_modified_bessel_k0.default special_scaled_modified_bessel_k1.default special_spherical_bessel_j0.default
special_xlog1py.default special_xlog1py.other_scalar special_xlog1py.self_scalar special_zeta.default
special_zeta.other_scalar special_zeta.self_scalar sqrt.default sub.Scalar sub.Tensor tan.default tanh.default
threshold.default trunc.default where.self xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor
# view: no data moves
alias.default as_strided.default detach.default diagonal.default expand.default lift_fresh.default permute.default
select.int slice.Tensor split.Tensor split_with_sizes.default squeeze.default squeeze.dim squeeze.dims t.default
transpose.int unbind.int unfold.default unsqueeze.default view.default view.dtype view_as_complex.default
view_as_real.default
# factory: no tensor goes in
arange.default arange.start arange.start_step empty.memory_format empty_permuted.default empty_strided.default
eye.default eye.m full.default hann_window.default linspace.default logspace.default ones.default scalar_tensor.default
tril_indices.default triu_indices.default zeros.default
# other: contractions, reductions, normalizations, indexing, copies, solvers
_adaptive_avg_pool2d.default _adaptive_avg_pool3d.default _addmm_activation.default _assert_async.msg
_assert_scalar.default _batch_norm_with_update_functional.default _cdist_forward.default _fft_c2c.default
_fft_c2r.default _fft_r2c.default _fused_rms_norm.default _int_mm.default _linalg_check_errors.default
_linalg_det.default _linalg_eigh.default _linalg_slogdet.default _linalg_solve_ex.default _linalg_svd.default
_local_scalar_dense.default _log_softmax.default _native_batch_norm_legit.no_stats
_native_batch_norm_legit_functional.default _native_batch_norm_legit_no_training.default _pdist_forward.default
_prelu_kernel.default _safe_softmax.default _scaled_mm.default _softmax.default _to_copy.default _trilinear.default
_unique2.default _unsafe_index.Tensor _unsafe_view.default _upsample_bicubic2d_aa.default _upsample_bicubic2d_aa.vec
_upsample_bilinear2d_aa.default _upsample_bilinear2d_aa.vec _upsample_nearest_exact1d.default
_upsample_nearest_exact1d.vec _upsample_nearest_exact2d.default _upsample_nearest_exact2d.vec
_upsample_nearest_exact3d.default _upsample_nearest_exact3d.vec _weight_norm_interface.default
adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default adaptive_max_pool1d.default
adaptive_max_pool2d.default adaptive_max_pool3d.default addbmm.default addmm.default addmm.dtype addmv.default
addr.default affine_grid_generator.default alias_copy.default all.default all.dim all.dims amax.default amin.default
aminmax.default any.default any.dim any.dims argmax.default argmin.default avg_pool1d.default avg_pool2d.default
avg_pool3d.default baddbmm.default baddbmm.dtype bilinear.default binary_cross_entropy.default
binary_cross_entropy_with_logits.default block_diag.default bmm.default bmm.dtype bucketize.Scalar bucketize.Tensor
cat.default channel_shuffle.default cholesky.default cholesky_inverse.default cholesky_solve.default col2im.default
complex.default constant_pad_nd.default conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default
conv3d.padding conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input convolution.default copy.default
count_nonzero.default count_nonzero.dim_IntList cudnn_batch_norm.default cummax.default cummin.default cumprod.default
cumsum.default diag_embed.default diagonal_copy.default diagonal_scatter.default dist.default dot.default
embedding.default embedding_renorm.default empty_like.default expand_copy.default fill.Scalar fill.Tensor flip.default
floor_divide.default full_like.default gather.default geqrf.default glu.default grid_sampler.default
grid_sampler_2d.default grid_sampler_3d.default group_norm.default hardswish.default histc.default huber_loss.default
im2col.default index.Tensor index_add.default index_copy.default index_fill.int_Scalar index_fill.int_Tensor
index_put.default index_reduce.default index_select.default instance_norm.default isin.Scalar_Tensor isin.Tensor_Scalar
isin.Tensor_Tensor kthvalue.default layer_norm.default lift.default lift_fresh_copy.default linalg_cholesky_ex.default
linalg_cross.default linalg_eig.default linalg_householder_product.default linalg_inv_ex.default
linalg_ldl_factor_ex.default linalg_lu.default linalg_lu_factor_ex.default linalg_matrix_exp.default
linalg_pinv.atol_rtol_tensor linalg_qr.default linalg_solve_triangular.default linalg_vector_norm.default linear.default
linspace.Scalar_Tensor linspace.Tensor_Scalar linspace.Tensor_Tensor log_sigmoid.default log_sigmoid_forward.default
log_softmax.int logcumsumexp.default logspace.Scalar_Tensor logspace.Tensor_Scalar logspace.Tensor_Tensor
logsumexp.default masked_fill.Tensor masked_scatter.default matmul.default max.default max.dim max_pool1d.default
max_pool2d.default max_pool2d_with_indices.default max_pool3d.default max_pool3d_with_indices.default
max_unpool2d.default max_unpool3d.default mean.default mean.dim median.default median.dim min.default min.dim mm.default
mm.dtype mode.default mse_loss.default mv.default nanmedian.default nanmedian.dim nansum.default narrow_copy.default
native_batch_norm.default native_group_norm.default native_layer_norm.default new_empty.default
new_empty_strided.default new_full.default new_ones.default new_zeros.default nll_loss2d_forward.default
nll_loss_forward.default nonzero.default nonzero_static.default norm.Scalar norm.ScalarOpt_dim one_hot.default
ones_like.default ormqr.default permute_copy.default pixel_shuffle.default pixel_unshuffle.default polar.default
prelu.default prod.default prod.dim_int put.default reflection_pad1d.default reflection_pad2d.default
reflection_pad3d.default renorm.default repeat.default repeat_interleave.self_int replication_pad1d.default
replication_pad2d.default replication_pad3d.default rms_norm.default roll.default rot90.default rsub.Tensor
scatter.reduce scatter.src scatter.value scatter.value_reduce scatter_add.default scatter_reduce.two searchsorted.Scalar
searchsorted.Tensor select_scatter.default slice_scatter.default smooth_l1_loss.default soft_margin_loss.default
softmax.int sort.default sort.stable split_with_sizes_copy.default squeeze_copy.default squeeze_copy.dim
squeeze_copy.dims stack.default std.correction std_mean.correction sum.default sum.dim_IntList sym_size.int
t_copy.default take.default topk.default trace.default transpose_copy.int triangular_solve.default tril.default
triu.default unbind_copy.int unfold_copy.default unique_dim.default unsafe_split.Tensor unsqueeze_copy.default
upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec
upsample_linear1d.default upsample_linear1d.vec upsample_nearest1d.default upsample_nearest1d.vec
upsample_nearest2d.default upsample_nearest2d.vec upsample_nearest3d.default upsample_nearest3d.vec
upsample_trilinear3d.default upsample_trilinear3d.vec var.correction var_mean.correction vdot.default view_copy.default
view_copy.dtype zero.default zeros_like.default
# backward: gradients
_adaptive_avg_pool2d_backward.default _adaptive_avg_pool3d_backward.default _cdist_backward.default
_embedding_bag_dense_backward.default _fused_rms_norm_backward.default _log_softmax_backward_data.default
_pdist_backward.default _prelu_kernel_backward.default _scaled_dot_product_cudnn_attention_backward.default
_scaled_dot_product_efficient_attention_backward.default _scaled_dot_product_flash_attention_backward.default
_scaled_dot_product_flash_attention_for_cpu_backward.default _softmax_backward_data.default
_upsample_bicubic2d_aa_backward.default _upsample_bilinear2d_aa_backward.default
_upsample_nearest_exact1d_backward.default _upsample_nearest_exact2d_backward.default
_upsample_nearest_exact3d_backward.default _weight_norm_interface_backward.default adaptive_max_pool2d_backward.default
adaptive_max_pool3d_backward.default avg_pool2d_backward.default avg_pool3d_backward.default
binary_cross_entropy_backward.default convolution_backward.default elu_backward.default embedding_dense_backward.default
gelu_backward.default glu_backward.default grid_sampler_2d_backward.default grid_sampler_3d_backward.default
hardsigmoid_backward.default hardswish_backward.default hardtanh_backward.default huber_loss_backward.default
leaky_relu_backward.default linear_backward.default log_sigmoid_backward.default
max_pool2d_with_indices_backward.default max_pool3d_with_indices_backward.default mish_backward.default
mse_loss_backward.default native_batch_norm_backward.default native_dropout_backward.default
native_group_norm_backward.default native_layer_norm_backward.default nll_loss2d_backward.default
nll_loss_backward.default reflection_pad1d_backward.default reflection_pad2d_backward.default
reflection_pad3d_backward.default replication_pad1d_backward.default replication_pad2d_backward.default
replication_pad3d_backward.default select_backward.default sigmoid_backward.default silu_backward.default
slice_backward.default smooth_l1_loss_backward.default soft_margin_loss_backward.default softplus_backward.default
tanh_backward.default threshold_backward.default unfold_backward.default upsample_bicubic2d_backward.default
upsample_bilinear2d_backward.default upsample_linear1d_backward.default upsample_nearest1d_backward.default
upsample_nearest2d_backward.default upsample_nearest3d_backward.default upsample_trilinear3d_backward.default
# random: draws from the random number generator: never hoisted, never merged
_scaled_dot_product_cudnn_attention.default _scaled_dot_product_efficient_attention.default
_scaled_dot_product_flash_attention.default _scaled_dot_product_flash_attention_for_cpu.default bernoulli.Tensor
bernoulli.default bernoulli.p cauchy.default exponential.default geometric.default gru.input log_normal.default
lstm.input multinomial.default native_dropout.default normal.Tensor_Tensor normal.Tensor_float normal.float_Tensor
normal.float_float normal_functional.default rand.default rand.generator rand_like.default rand_like.generator
randint.default randint.generator randint.low randint.low_generator randint_like.Tensor randint_like.Tensor_generator
randint_like.default randint_like.generator randint_like.low_dtype randint_like.low_generator_dtype randn.default
randn.generator randn_like.default randn_like.generator randperm.default randperm.generator
scaled_dot_product_attention.default uniform.default
# effect: writes to an input or a weight
copy_.default index_copy_.default index_put_.default scatter_.src scatter_.value
# unchecked: PyTorch trusts addresses, offsets or lengths in them, nothing bounds their time, or their types are wrong
_chunk_cat.default _dyn_quant_matmul_4bit.default _embedding_bag.default _embedding_bag_forward_only.default
_grouped_mm.default _histogramdd_bin_edges.default _histogramdd_from_bin_cts.default
_histogramdd_from_bin_tensors.default _reshape_alias.default _thnn_fused_lstm_cell.default _unsafe_index_put.default
_unsafe_masked_index.default _unsafe_masked_index_put_accumulate.default _weight_int4pack_mm.default
_weight_int4pack_mm_for_cpu.default as_strided_copy.default as_strided_scatter.default
cudnn_convolution_add_relu.default cudnn_convolution_relu.default embedding_bag.default embedding_bag.padding_idx
fractional_max_pool2d.default fractional_max_pool3d.default gru.data hash_tensor.default histogram.bin_ct
histogram.bins_tensor ldexp.Tensor linalg_ldl_solve.default linalg_lu_solve.default linalg_matrix_sqrth.default
linalg_polar.default lstm.data lu_unpack.default mkldnn_rnn_layer.default mvlgamma.default repeat_interleave.Tensor
repeat_interleave.self_Tensor rrelu_with_noise_functional.default segment_reduce.default
special_chebyshev_polynomial_t.default special_chebyshev_polynomial_t.n_scalar special_chebyshev_polynomial_t.x_scalar
special_chebyshev_polynomial_u.default special_chebyshev_polynomial_u.n_scalar special_chebyshev_polynomial_u.x_scalar
special_chebyshev_polynomial_v.default special_chebyshev_polynomial_v.n_scalar special_chebyshev_polynomial_v.x_scalar
special_chebyshev_polynomial_w.default special_chebyshev_polynomial_w.n_scalar special_chebyshev_polynomial_w.x_scalar
special_hermite_polynomial_h.default special_hermite_polynomial_h.n_scalar special_hermite_polynomial_h.x_scalar
special_hermite_polynomial_he.default special_hermite_polynomial_he.n_scalar special_hermite_polynomial_he.x_scalar
special_laguerre_polynomial_l.default special_laguerre_polynomial_l.n_scalar special_laguerre_polynomial_l.x_scalar
special_legendre_polynomial_p.default special_legendre_polynomial_p.n_scalar special_legendre_polynomial_p.x_scalar
special_shifted_chebyshev_polynomial_t.default special_shifted_chebyshev_polynomial_t.n_scalar
special_shifted_chebyshev_polynomial_t.x_scalar special_shifted_chebyshev_polynomial_u.default
special_shifted_chebyshev_polynomial_u.n_scalar special_shifted_chebyshev_polynomial_u.x_scalar
special_shifted_chebyshev_polynomial_v.default special_shifted_chebyshev_polynomial_v.n_scalar
special_shifted_chebyshev_polynomial_v.x_scalar special_shifted_chebyshev_polynomial_w.default
special_shifted_chebyshev_polynomial_w.n_scalar special_shifted_chebyshev_polynomial_w.x_scalar
"""
INTERNAL = frozenset(  # which `aten` and `detection` define
    f"torch_rtx.{name}.default"
    for name in (
        *("attention", "attention_partial", "flex_attention", "flex_attention_partial", "grouped_mm"),
        *("int_conv", "launch", "suppressed", "to_int8"),
    )
)
TRAINING = frozenset(f"torch_rtx.attention_{name}.default" for name in ("forward", "backward", "backward_partial"))
TRAINING |= {f"torch_rtx.flex_attention_{name}.default" for name in ("grad_query", "grad_key_value", "grad_captured")}
NUMBERS = frozenset(  # Python's arithmetic on numbers of the host, which `host_ops` defines
    f"torch_rtx.{name}.default"
    for name in (
        *("abs", "neg", "pos", "ceil", "floor", "trunc", "round", "sym_float", "sym_int", "sym_not", "sym_ite"),
        *("sqrt", "log2", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "sym_min", "sym_max"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "lshift", "rshift"),
    )
)
DECIDED = NUMBERS | {  # see `aten.is_decided`
    *("aten.nonzero.default", "aten._local_scalar_dense.default", "aten._unique2.default", "aten.unique_dim.default"),
}
COLLECTIVES = frozenset(  # of torch.distributed, which `collectives` describes
    f"_c10d_functional.{name}.default"
    for name in (
        *("all_gather_into_tensor", "all_gather_into_tensor_coalesced", "all_reduce", "all_reduce_"),
        *("all_reduce_coalesced", "all_to_all_single", "broadcast"),
        *("reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"),
    )
) | {"_dtensor.shard_dim_alltoall.default"}
WAIT = "torch_rtx.wait.default"  # for a collective, see `collectives`
UNTRUSTED = ("backward", "unchecked")  # headings of ops that a file may call only if its user names them


def _under_headings() -> dict[str, frozenset[str]]:
    """The ops by the first word of their heading."""
    parts = (part.partition("\n") for part in _NAMES.split("\n# ")[1:])
    return {head.partition(":")[0]: frozenset(f"aten.{name}" for name in names.split()) for head, _, names in parts}


_HEADINGS = _under_headings()
POINTWISE = _HEADINGS["pointwise"]
ALLOWED: frozenset[str] = (INTERNAL | TRAINING | NUMBERS | COLLECTIVES | {WAIT}).union(*_HEADINGS.values())
# Launches a kernel that others wrote, which alone knows what it does to memory: allowed in a file by the decision for
# binaries.
LAUNCH = "torch_rtx.launch.default"
FILE_OPS: frozenset[str] = (ALLOWED - TRAINING - {LAUNCH}).difference(*(_HEADINGS[heading] for heading in UNTRUSTED))
