"""Attention kernels behind the operator `sparge::attention`; usable without the compiler.

Import `sparge_kernels.ops` to register the operator. Nothing here imports a kernel language.
"""
