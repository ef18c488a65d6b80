"""Advice on the sizes that serving engines and their kernels want: one line, where there is anything to say.

What each engine accepts is in docs/source/serving.md, with what has been run.  That llama.cpp needs more experts than
a router has groups is no advice: every result has at least two in each group, as `models.refusals` sees to.
"""

from ...results.report import ModelSize


__all__ = ["advise_serving"]

VLLM_DEEPSEEK_V4 = {*(2**i for i in range(8)), 192, 256, 320, 384, 448, 512, 576}  # experts that its router loads
LLAMA_CPP_MOST = 1024
KERNELS = 64  # neurons: tiles of grouped matrix products, 16 at the very least


def advise_serving(model_type: str, before: ModelSize, after: ModelSize) -> str | None:
    """Return one line of advice on a compressed model's sizes, or None.

    Args:
        model_type: of the config.
        before: sizes of the original.
        after: of the compressed model, predicted or measured.
    """
    experts, width = after.experts, after.width
    if not experts:  # all layers are dense
        return None
    found = []
    if experts & (experts - 1) and experts % 8:
        below, above = 1 << (experts.bit_length() - 1), -(-experts // 8) * 8
        found.append(
            f"{experts} experts are neither a power of two nor a multiple of 8, which kernels prefer "
            f"({max(below, above - 8)} or {above} are), and must be divisible by the number of expert-parallel ranks"
        )
    if model_type == "deepseek_v4" and experts not in VLLM_DEEPSEEK_V4:
        nearest = min(VLLM_DEEPSEEK_V4, key=lambda count: abs(count - experts))
        found.append(f"vLLM's router of DeepSeek-V4 does not load {experts} experts, the nearest it does is {nearest}")
    if experts > LLAMA_CPP_MOST:
        found.append(f"llama.cpp loads at most {LLAMA_CPP_MOST:,} experts")
    if width != before.width and width % KERNELS:
        found.append(f"{width} neurons an expert are no multiple of {KERNELS}, which kernels prefer")
    return f"for serving: {'; '.join(found)}" if found else None
