"""diffusers' own shared tests, on STDiT and STDiTPipeline, beside Wan's model and pipeline in the same run:

    git clone https://github.com/huggingface/diffusers
    DIFFUSERS_TESTS=diffusers RESULTS=results.jsonl pytest -m slow tests/diffusers_suite

What of them does not apply, and why:

- IPAdapterTesterMixin, UNetLoraTesterMixin: for models with image prompts, and for U-Nets.
- ContextParallelTesterMixin, TensorParallelTesterMixin: for GPUs, and for other ways of sharding than STDiT's.
- SingleFileTesterMixin, and the quantisation mixins (bitsandbytes, TorchAO, GGUF, Quanto, ModelOpt, SDNQ, AutoRound,
  Nunchaku): they load a model of the hub. tests/models and tests/pipelines have our own.
- Text encoder LoRAs (6 skipped tests of LoraTesterMixin): the pipeline has none, like Wan's.

With diffusers 0.42.1 and the tests of 2026-08-23, on a machine without an accelerator, 149 tests pass on STDiT, with
``pred_sigma`` and without, and 143 on Wan; 20 and 27 fail, 43 are skipped. On every mixin STDiT passes at least as
many.

What fails on a machine without an accelerator, for Wan and for STDiT alike: offloading by streams, offloading of
models and of layers to the CPU, and loading a LoRA into a pipeline with CPU offload.
"""
