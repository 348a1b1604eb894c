"""The device code inside the released vllm-xpu-kernels wheels, executed on an OpenCL CPU device.

Every library of the wheel carries, besides machine code for a few GPUs, the SPIR-V it was made from. Those modules
are taken out (`wheel`), cut down to one kernel (`spirv`), built and launched (`device`), one function per operator
(`operators`). Nothing of the wheel is kept in this repository.

Needs the extra `shipped` and a wheel; `scripts/lanes/shipped` brings both.
"""
