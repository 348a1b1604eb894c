"""The device code inside released wheels, executed on an OpenCL CPU device.

Every library of vllm-xpu-kernels carries, besides machine code for a few GPUs, the SPIR-V it was made from, and so does
ARK's for XPU. Those modules are taken out (`wheel`), cut down to one kernel (`spirv`), freed of what only a GPU has
(`portable`, `visa`), built and launched (`device`), one function per operator (`operators`, `ark`). Nothing of a wheel
is kept in this repository. docs/shipped-kernels.md says what was executed, and what was learned.

Needs the extra `shipped` and a wheel; `scripts/lanes/shipped` brings both.
"""
