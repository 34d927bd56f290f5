"""Kernels tested without a GPU: what stands for one, and what looks at what Triton compiles. Nothing that trains imports it.

The emulator of PTX, of numpy and the standard library; each imports only what is above it:

    numbers.py        formats and rounding, exact
    ptx.py            text -> a program; opcode.py, the words of an opcode, and what one becomes
    memory.py         addresses and their checks
    arithmetic.py, logic.py, conversions.py, accesses.py, warps.py, tensorcores.py      what each instruction does
    instructions.py   all of them by name
    lanes.py          registers, and which lanes run when, one numpy element a lane of the whole grid
    machine.py        run_kernel(ptx, grid, arrays), and one inline assembly

What uses it:

    device.py         a driver of a GPU that is not there: launches are compiled for an architecture, and executed
    interpreter.py    repairs of Triton's interpreter
    inspection.py     registers, spills, memory, instructions of a compiled kernel
    operands.py       matrices to quantise, and what was made of them compared with what should have been
    variants.py       the operands of the shipped recipes
    check.py          make kernels-check
    settle.py         make test-gpu: how cvt.rs uses its random bits
"""
