"""How many machine instructions each kernel has on sm_90: the counts that were measured, and what exceeds them.

As a script it prints the counts of the Triton that it finds, as rows for `MEASURED`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator

import aot
import cases
from cases import BlockConfig, Case

# Counted opcodes, in the order of the table's columns behind instructions and registers.
OPCODES = ("MUFU", "FSETP", "LDS", "STS", "STSM", "LDG", "STG", "SHFL", "BAR", "HGMMA", "UTMALDG", "UTMASTG")
COLUMNS = ("instructions", "registers", *OPCODES)
# What must be there as counted: a loop that is there twice has twice the products, one that lost TMA has no bulk loads.
EXACT = ("HGMMA", "UTMALDG")
# A few per cent, and room for a count that is small: a second epilogue or a division path adds 15 % and more.
MARGIN, LEAST_MARGIN = 0.04, 2
# A version that nobody measured: it must be no worse than the worst known one by more than this.
UNKNOWN_MARGIN = 0.25
# The smaller tile of down_dgrad, which was its fallback, and which small experts may get from tuning.
_SMALL_DGRAD = BlockConfig(128, 128, 64, 8, 4, slices=4)

# Versions are major.minor. A row is a launch of cases.py with the fallback's blocks, unless named otherwise.
MEASURED: dict[str, str] = {
    "3.6": """
#                        instructions reg  MUFU FSETP   LDS   STS  STSM   LDG   STG  SHFL   BAR HGMMA TMALDG TMASTG
count                              400    48     0     0    33    41     0     1     1     2     5     0     0     0
cross_entropy_gradient_100         280    23     7     7     0     0     0     9    14     0     0     0     0     0
cross_entropy_gradient_32064       328    32    16    16     0     0     0     4     2     0     0     0     0     0
cross_entropy_statistics_100       304    25     8    30     4     4     0     9     3    14     5     0     0     0
cross_entropy_statistics_32064     600    57    32    81     4     4     0     4     3    16     5     0     0     0
down_dgrad                        3752   237   262     0    65    65    16    12     1    16    48     4    10     8
down_dgrad_128x128                2536   138   136     0    33    33     8    15     1    16    53     4    12     8
gather_number                       72    30     0     0     0     0     0    12     2     0     0     0     0     0
gather_numbers                     120    32     0     0     0     0     0    20     4     0     0     0     0     0
gather_rows                        112    18     0     0     0     0     0     9     8     0     0     0     0     0
gather_sum                         296    38     0     0     0     0     0    16     1     0     0     0     0     0
m_grouped                         1144   159     8     0     0     0    16    13     0     0    24     4     8     2
m_grouped_dgrad                   1152   162     8     0     0     0    16    13     0     0    24     4     8     2
place                             1456   167     0     0   164   164     1    12     7     8     6     0     0     0
router_dgrad_1024                  784   190     1     0    39    16     8     0     0     0     8    12     2     1
router_dgrad_128                   752   178     1     0    39    16     8     0     0     0     8    12     2     1
router_dgrad_16                    328    98     1     0     6     6     8     2     0     0    10     3     1     1
router_dgrad_3                     376    98     1     0     6     4    10     8     0     0    10     3     1     1
router_dgrad_64                    624   132     1     0    24    24     8     8     0     0    10    12     1     1
router_logits_1024                 984   163     0     0    24    40     0     0    16     0    16    12     6     0
router_logits_128                  968   160     0     0    24    40     0     0    16     0    16    12     6     0
router_logits_16                   712    64     0     0     8    16     0     0     2     0    22    24     8     0
router_logits_3                    752    64     0     0     8    16     0     0     8     0    22    24     8     0
router_logits_64                   656    99     0     0    20    28     0     0     8     0    16    12     6     0
router_wgrad_1024                 1208   164     1     0    41    40     0     0    16     0    23    12     4     0
router_wgrad_128                  1184   162     1     0    41    40     0     0    16     0    23    12     4     0
router_wgrad_16                    720    69     1     0    27    14     0     0     4     0    17    24     4     0
router_wgrad_3                     856    68     1     0    27    24     4     0     3     0    23    24     4     0
router_wgrad_64                    840    90     1     0    29    20     0     0     8     0    19    12     4     0
schedule                           136    32     0     0     0     0     0     1    17     4     0     0     0     0
sparsemixer_backward_128_8         832    48     8    27     7     8     1     5     1    57    10     0     0     0
sparsemixer_backward_16_2          680    48     8    26     0     0     0     5     1    16     0     0     0     0
sparsemixer_backward_paper_mask    624    47     4    23     0     0     0     5     1    16     0     0     0     0
sparsemixer_forward_128_8         1072    55     8    39    21    23     0     2     6    59    19     0     0     0
sparsemixer_forward_16_2          1056    64     8    39    17    19     0     2     6    56    23     0     0     0
sparsemixer_forward_3_1           1144    55    14    46    13    16     0     5     6    95    16     0     0     0
sparsemixer_forward_inference      848    53     8    31    14    16     0     1     6    49    17     0     0     0
sparsemixer_forward_paper_mask     992    64     4    35    17    19     0     2     6    56    23     0     0     0
sparsemixer_sums_128_8             384    64     0     0    12    14     0     9     3    46    12     0     0     0
sparsemixer_sums_16_2              384    64     0     0    12    14     0     9     3    46    12     0     0     0
sparsemixer_sums_3_1               480    80     0     0     6     6     0    33     3    18     8     0     0     0
sparsemixer_sums_inference         384    64     0     0    12    14     0     9     3    46    12     0     0     0
sparsemixer_sums_paper_mask        384    64     0     0    12    14     0     9     3    46    12     0     0     0
up_swiglu                         2152   174   136     0     0    64    16    15     0     0    36     4     8     8
up_swiglu_gather                  2400   255   136     0    44    64    16    31     0     0    33     4     4     8
up_swiglu_inference               1952   176   136     0     0    64     0    15     0     0    28     4     8     4
wgrad                             1520   184    16     0     0     0    16    22     0     0    24     4     8     2
wgrad_accumulate                  1328   178    13     0     0    64     0    20     0     0    19     4     6     0
wgrad_fp32                        1328   178    13     0     0    64     0    20     0     0    19     4     6     2
""",
    "3.9": """
#                        instructions reg  MUFU FSETP   LDS   STS  STSM   LDG   STG  SHFL   BAR HGMMA TMALDG TMASTG
count                              400    32     0     0     8    16     0     1     1     0    10     0     0     0
cross_entropy_gradient_100         280    23     7     7     0     0     0     9    14     0     0     0     0     0
cross_entropy_gradient_32064       328    30    16    16     0     0     0     4     2     0     0     0     0     0
cross_entropy_statistics_100       288    26     8    30     2     2     0     9     3    14     3     0     0     0
cross_entropy_statistics_32064     584    56    32    81     2     2     0     4     3    16     3     0     0     0
down_dgrad                        3832   246   262     0    65    65    16    12     1    16    41     4    10     8
down_dgrad_128x128                2592   138   136     0    33    33     8    15     1    16    44     4    12     8
gather_number                       72    30     0     0     0     0     0    12     2     0     0     0     0     0
gather_numbers                     120    32     0     0     0     0     0    20     4     0     0     0     0     0
gather_rows                        112    18     0     0     0     0     0     9     8     0     0     0     0     0
gather_sum                         296    34     0     0     0     0     0    16     1     0     0     0     0     0
m_grouped                         1184   154     8     0     0     0    16    13     0     0    19     4     8     2
m_grouped_dgrad                   1184   154     8     0     0     0    16    13     0     0    19     4     8     2
place                             1616    94     0     0    64    64     1    12     7     0    35     0     0     0
router_dgrad_1024                  856   189     1     0    46    16     8     0     0     0    12    12     2     1
router_dgrad_128                   816   178     1     0    46    16     8     0     0     0    12    12     2     1
router_dgrad_16                    336    98     1     0     6     6     8     2     0     0     9     3     1     1
router_dgrad_3                     384    98     1     0     6     4    10     8     0     0     9     3     1     1
router_dgrad_64                    664   124     1     0    24    24     8     8     0     0     9    12     1     1
router_logits_1024                 992   160     0     0    24    40     0     0    16     0    19    12     6     0
router_logits_128                  984   160     0     0    24    40     0     0    16     0    19    12     6     0
router_logits_16                   696    69     0     0     8    16     0     0     2     0    21    24     8     0
router_logits_3                    744    69     0     0     8    16     0     0     8     0    21    24     8     0
router_logits_64                   672    80     0     0    20    28     0     0     8     0    19    12     6     0
router_wgrad_1024                 1224   162     1     0    48    40     0     0    16     0    21    12     4     0
router_wgrad_128                  1208   162     1     0    48    40     0     0    16     0    21    12     4     0
router_wgrad_16                    752    71     1     0    27    14     0     0     4     0    12    24     4     0
router_wgrad_3                     896    78     1     0    27    24     4     0     3     0    18    24     4     0
router_wgrad_64                    848    94     1     0    36    20     0     0     8     0    17    12     4     0
schedule                           136    32     0     0     0     0     0     1    17     4     0     0     0     0
sparsemixer_backward_128_8         816    48     8    26     3     4     1     5     1    53     9     0     0     0
sparsemixer_backward_16_2          680    48     8    26     0     0     0     5     1    16     0     0     0     0
sparsemixer_backward_paper_mask    624    47     4    23     0     0     0     5     1    16     0     0     0     0
sparsemixer_forward_128_8         1040    56     8    38     8    10     0     2     6    49    20     0     0     0
sparsemixer_forward_16_2          1032    58     8    38     6     8     0     2     6    70    16     0     0     0
sparsemixer_forward_3_1           1136    48    14    46     8    11     2     5     6    95    13     0     0     0
sparsemixer_forward_inference      840    49     8    30     5     7     0     1     6    61    14     0     0     0
sparsemixer_forward_paper_mask     960    56     4    35     6     8     0     2     6    70    16     0     0     0
sparsemixer_sums_128_8             384    66     0     0     3     5     0     9     3    48     9     0     0     0
sparsemixer_sums_16_2              384    66     0     0     3     5     0     9     3    48     9     0     0     0
sparsemixer_sums_3_1               464    76     0     0     5     5     0    33     3    15     9     0     0     0
sparsemixer_sums_inference         384    66     0     0     3     5     0     9     3    48     9     0     0     0
sparsemixer_sums_paper_mask        384    66     0     0     3     5     0     9     3    48     9     0     0     0
up_swiglu                         2136   255   136     0     0    64    16    15     0     0    31     4     8     8
up_swiglu_gather                  2400   252   136     0    48    64    16    31     0     0    28     4     4     8
up_swiglu_inference               1960   178   136     0     0    64     0    15     0     0    23     4     8     4
wgrad                             1608   154    16     0     0     0    16    22     0     0    19     4     8     2
wgrad_accumulate                  1384   154    13     0     0    64     0    20     0     0    16     4     6     0
wgrad_fp32                        1384   154    13     0     0    64     0    20     0     0    16     4     6     2
""",
}


def sm_90_cases() -> list[Case]:
    """The launches that are counted: sm_90, fallback blocks, bf16 (fp32 where a kernel knows nothing else)."""
    listed = [case for case in cases.all_cases() if is_counted(case)]
    return sorted(listed, key=name)


def is_counted(case: Case) -> bool:
    """Whether `MEASURED` has a row for it."""
    if case.arch != 90 or case.dtype != ("fp32" if case.module == "sparsemixer_triton" else "bf16"):
        return False
    return case.blocks is None or (case.launch == "down_dgrad" and case.blocks == _SMALL_DGRAD)


def name(case: Case) -> str:
    """The row's name."""
    prefix = {"sparsemixer_triton": "sparsemixer_", "cross_entropy_triton": "cross_entropy_"}.get(case.module, "")
    return prefix + case.launch + ("_128x128" if case.blocks else "")


def count(disassembly: str) -> dict[str, int]:
    """Instructions in all (padding included) and of each of OPCODES in the text of `nvdisasm -c`."""
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", disassembly, re.MULTILINE)
    by_opcode = Counter(found)
    return {"instructions": len(found), **{opcode: by_opcode[opcode] for opcode in OPCODES}}


def row_name(case: Case, report: aot.Report) -> str:
    """As `name`; a launcher that starts two kernels has a row for each."""
    return "sparsemixer_sums_" + case.launch.removeprefix("forward_") if report.kernel == "sparsemixer_sums" else name(case)


def version() -> str:
    """major.minor of the installed Triton."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def table(of: str) -> dict[str, dict[str, int]]:
    """Row name to counts of one version."""
    rows = (line.split() for line in MEASURED[of].strip().splitlines()[1:])
    return {row: dict(zip(COLUMNS, map(int, numbers), strict=True)) for row, *numbers in rows}


def problems(found: dict[str, dict[str, int]], of: str) -> list[str]:
    """Every count that is above its ceiling or not what it must be, every row without counts and the reverse."""
    known = of in MEASURED
    tables = [table(of)] if known else [table(other) for other in MEASURED]
    wrong = [f"{row}: not in the table of Triton {of}" for row in found if any(row not in each for each in tables)]
    wrong += [f"{row}: in the table of Triton {of}, not compiled" for row in tables[0] if row not in found]
    for row in sorted(set(found) & set(tables[0])):
        for column, value in found[row].items():
            listed = [each[row][column] for each in tables]
            ceiling = max(listed) + max(LEAST_MARGIN, int(max(listed) * (MARGIN if known else UNKNOWN_MARGIN)))
            if column in EXACT and value not in listed:
                wrong.append(f"{row}: {value} {column}, not {listed[0]}")
            elif value > ceiling:
                wrong.append(f"{row}: {value} {column}, at most {ceiling} (measured: {max(listed)})")
    return wrong


def measure() -> Iterator[tuple[str, dict[str, int]]]:
    """Rows of the Triton that is imported, compiled or from its cache."""
    os.environ["TRITON_CACHE_DIR"] = str(aot.cache_folder())
    for case in sm_90_cases():
        with aot.compiling(90) as compiled:
            case.run()
        for kernel in compiled:
            report = aot.report(kernel, 90, disassemble=True)
            yield row_name(case, report), report.counts


def line(row: str, counts: dict[str, int]) -> str:
    """A row as it stands in `MEASURED`."""
    return f"{row:32}" + "".join(f"{counts[column]:6}" for column in COLUMNS)


if __name__ == "__main__":
    for row, counts in measure():
        print(line(row, counts), flush=True)
