"""How many of a cluster's slots each of several sweeps may have. Pure arithmetic: knows no cluster and no workers.

Max-min fairness (Bertsekas and Gallager 1992, section 6.5.2) in whole slots: one slot at a time is dealt to every sweep
that wants more, in order, until slots or wishes run out. A sweep that wants little gets it, and what it leaves is dealt
among the others; the order decides only who gets the slots that are left over.
"""

from collections.abc import Mapping


def fair_shares(slots: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Slots of each sweep, by its name; the shares add up to `slots` or to all that is wanted. Empty in, empty out.

    Earlier names in sorted order get the slots that cannot be divided, and all there are where sweeps outnumber slots.
    """
    shares = dict.fromkeys(sorted(wanted), 0)
    left = slots
    while left > 0 and (hungry := [name for name in shares if shares[name] < wanted[name]]):
        for name in hungry[:left]:
            shares[name] += 1
        left -= min(left, len(hungry))
    return shares
