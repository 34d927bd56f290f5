"""Kernels tested without a GPU: what stands for one, and what looks at what Triton compiles.

numbers.py        floats of 4 to 32 bits in numpy, exact
ptx.py            PTX text -> a program
lanes.py          registers, memory and control flow, one numpy element a lane of the whole grid
instructions.py   what each instruction does
machine.py        run_kernel(ptx, grid, arrays), and one inline assembly
device.py         a driver of a GPU that is not there: launches are compiled for an architecture, and executed
interpreter.py    repairs of Triton's interpreter
inspection.py     registers, spills, memory, instructions of a compiled kernel
variants.py       the operands of the shipped recipes
check.py          make kernels-check
"""
