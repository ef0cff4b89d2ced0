"""diffusers' own shared tests, on STDiT and STDiTPipeline, beside Wan's model and pipeline in the same run:

    git clone https://github.com/huggingface/diffusers
    DIFFUSERS_TESTS=diffusers RESULTS=results.jsonl pytest -m slow tests/diffusers_suite

What of them does not apply, and why:

- IPAdapterTesterMixin, UNetLoraTesterMixin: for models with image prompts, and for U-Nets.
- ContextParallelTesterMixin, TensorParallelTesterMixin: for GPUs, and for other ways of sharding than STDiT's.
- SingleFileTesterMixin, and the quantisation mixins (bitsandbytes, TorchAO, GGUF, Quanto, ModelOpt, SDNQ, AutoRound,
  Nunchaku): they load a model of the hub. tests/models and tests/pipelines have our own.
- Text encoder LoRAs (6 skipped tests of LoraTesterMixin): the pipeline has none, like Wan's.

What fails on a machine without an accelerator, for Wan and for STDiT alike: offloading by streams, offloading of
models and of layers to the CPU, and loading a LoRA into a pipeline with CPU offload.
"""
