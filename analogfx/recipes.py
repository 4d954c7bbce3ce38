"""Published settings, ready to use and to change."""

from analogfx.config import (
    InputRangeParameter,
    IOParameters,
    PrePostProcessingParameter,
    TorchInferenceRPUConfig,
    WeightClipParameter,
    WeightClipType,
    WeightModifierParameter,
    WeightNoiseInjectionType,
)


def afm() -> TorchInferenceRPUConfig:
    """Return the config that the Analog Foundation Models were trained with.

    8-bit static inputs with learned ranges, 8-bit outputs of one global bound, weights clipped at
    2.5 standard deviations of their channel, and weight noise of 3 % of the channel's maximum.

    Source: Büchel et al., "Analog Foundation Models", NeurIPS 2025, arXiv 2505.09663, as in the
    training file of Llama-3.2-1B-Instruct in the repository IBM/analog-foundation-models.
    """
    return TorchInferenceRPUConfig(
        forward=IOParameters(inp_res=254, out_res=254, out_bound=14, out_noise=0),
        clip=WeightClipParameter(type=WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, sigma=2.5),
        modifier=WeightModifierParameter(
            noise_type=WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, std_dev=0.03
        ),
        pre_post=PrePostProcessingParameter(
            input_range=InputRangeParameter(
                enable=True,
                learn_input_range=True,
                init_value=3.0,
                init_from_data=500,
                init_std_alpha=18.0,
                decay=0.01,
                input_min_percentage=0.95,
            )
        ),
    )
