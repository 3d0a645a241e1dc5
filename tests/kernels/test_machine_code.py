"""What cuobjdump prints, read: a loop within a loop, guards, modifiers, branches."""

import pytest

from seedling.kernels.machine_code import Unit, busiest_loop, by_unit, count, instructions_of, loops

DUMP = """
 Function k:
  REG:27 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
        Function : k
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000ff00000000800 */
        /*0010*/              @!P0 BRA 0xb0 ;                                      /* 0x0000000000b08947 */
        /*0020*/                   LDG.E.128 R4, desc[UR6][R4.64] ;                /* 0x0000000604117981 */
        /*0030*/                   LOP3.LUT R16, R15.reuse, 0x30003, R2, 0xea, !PT ;  /* 0x0000007f0f107812 */
        /*0040*/             @!UP0 UIADD3 UR4, UP0, UR4, 0x400, URZ ;              /* 0x0000040004047890 */
        /*0050*/               @P1 BRA 0x30 ;                                      /* 0x000000040b500947 */
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;            /* 0x000000040b500947 */
        /*0070*/                   IMAD.MOV.U32 R0, RZ, RZ, R9 ;                   /* 0x000000ffff007224 */
        /*0080*/                   I2F.U16 R0, R1 ;                                /* 0x000000ffff007224 */
        /*0090*/               @P0 BRA 0x20 ;                                      /* 0xfffffffc00740947 */
        /*00a0*/                   EXIT ;                                          /* 0x000000000000794d */
        /*00b0*/                   BRA 0xb0;                                       /* 0xfffffffc00fc7947 */
        /*00c0*/                   NOP;                                            /* 0x0000000000007918 */
"""


@pytest.fixture(scope="module")
def code():
    return instructions_of(DUMP)


def test_instructions_are_read_with_their_modifiers_and_without_guards_and_padding(code):
    assert [i.address for i in code] == [16 * n for n in range(12)]
    assert [i.opcode for i in code[:5]] == ["LDC", "BRA", "LDG.E.128", "LOP3.LUT", "UIADD3"]
    assert code[3].operands == "R16, R15.reuse, 0x30003, R2, 0xea, !PT"


def test_a_name_counts_whole_and_with_its_modifiers(code):
    assert count(code, "LDG") == count(code, "LDG.E.128") == 1
    assert count(code, "LD") == count(code, "LDG.128") == 0
    assert count(code, "I2F", "LOP3") == 2


def test_loops_are_the_innermost_and_the_busiest_is_chosen_by_name(code):
    assert [[i.address for i in body] for body in loops(code)] == [[0x30, 0x40, 0x50]]
    assert [i.name for i in busiest_loop(code, "LOP3")] == ["LOP3", "UIADD3", "BRA"]
    assert busiest_loop(code, "HMMA") == code


def test_every_instruction_keeps_one_unit_busy(code):
    found = by_unit(code)
    assert sum(found.values()) == len(code)
    assert (found[Unit.INTEGER], found[Unit.FLOAT], found[Unit.CONVERT], found[Unit.TENSOR]) == (1, 1, 1, 1)
    assert found[Unit.MEMORY] == 1
