"""How many prompt tokens a step reads while other sequences wait for their next token.

A step that also reads a piece of a prompt takes longer. How much longer depends on the model, the machine and the
text, so it is measured: the piece becomes shorter if such steps take more than `1 + SHARE` times as long as a step
without one, and longer if they take less. Results do not depend on it, because a prompt has the same bits however it
is cut.
"""

SHARE = 0.6  # of a plain step's time that a piece may add; clients should see less than twice the time for a token
FIRST = 8  # tokens of the first piece
AGAIN = 32  # steps with pieces after which the time of a plain step is measured anew


class Pace:
    """The length of pieces, between 1 and `most` tokens."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = float(min(FIRST, most))
        self._plain: dict[int, float] = {}  # seconds of a step without a piece, by the number of sequences in it
        self._since = 0  # steps with pieces since a plain one

    def budget(self, streams: int) -> int:
        """How many prompt tokens the next step may read if `streams` sequences get a token in it.

        It is 0 if the time of a plain step has to be measured first.
        """
        if streams == 0:
            return self._most
        return 0 if streams not in self._plain or self._since >= AGAIN else int(self._size)

    def note(self, streams: int, read: int, seconds: float) -> None:
        """Learn from a step that took `seconds`, gave `streams` sequences a token and read `read` prompt tokens."""
        if streams == 0:
            return
        if read == 0:
            known = self._plain.setdefault(streams, seconds)
            self._plain[streams] = known + 0.2 * (min(seconds, 2 * known) - known)  # one slow step says little
            self._since = 0
            return
        self._since += 1
        plain = self._plain.get(streams, seconds)
        wanted = read * SHARE * plain / max(seconds - plain, 0.01 * plain)
        # The rest of a prompt may be shorter than a piece: then only too long a step says something.
        if read >= int(self._size) or seconds > (1 + SHARE) * plain:
            self._size = min(max(wanted, 0.5 * self._size, 1), 1.5 * self._size, self._most)
