"""Manual pages become prose."""
# ruff: noqa: RUF001 - typographic characters are what is tested

import pytest

from overhaul.troff import page_text, plain

PAGE = r"""'\" t
.\" A comment.
.TH OPEN 2 2023-02-05 "Linux man-pages 6.03"
.ie n \{\
.    ds C` ""
.    br
'br\}
.el\{\
.    ds C` ``
'br\}
.SH NAME
open \- open a file
.SH SYNOPSIS
.nf
.BI "int open(const char *" pathname ", int " flags );
.fi
.SH DESCRIPTION
The
.BR open ()
call opens
.IR pathname .\" not this
It is \fBfast\fP\&, says
.UR http://example.org
the kernel
.UE .
.PP
A long \
line.
.TP
.B O_APPEND
Append at \(dqthe end\(dq.
.IP \(bu 3
One.
.TS
l l.
cell	cell
.TE
.SS A subsection
.EX
if (x)
    y(\(aqa\\n\(aq);
.EE
.SH COLOPHON
This page is part of release 6.03.
"""


def test_a_page_becomes_paragraphs():
    assert page_text(PAGE).split("\n\n") == [
        "NAME",
        "open - open a file",
        "SYNOPSIS",
        "int open(const char *pathname, int flags);",
        "DESCRIPTION",
        "The open() call opens pathname. It is fast, says the kernel <http://example.org>.",
        "A long line.",
        'O_APPEND\nAppend at "the end".',
        "• One.",
        "A subsection",
        "if (x)\n    y('a\\n');",
    ]


@pytest.mark.parametrize(
    ("troff", "text"),
    [
        (r"\fBbold\fP \f(CWcode\fR \f[I]it\f[]", "bold code it"),
        (r"\s-1SMALL\s0 \s+2big\s-2", "SMALL big"),
        (r"\-\-all", "--all"),
        (r"C:\edir", r"C:\dir"),
        (r"a\ b\~c\0d\|e\&f\,g\/h", "a b c defgh"),
        (r"\(em \[en] \(lqq\(rq", "— – “q”"),
        (r"na\[u00EF]ve \(:u \('e \[char65]", "naïve ü é A"),
        (r"\*(lqx\*(rq \*R", "“x” "),
        (r"a\h'1'b\v'-.4m'c", "abc"),
        (r"\m[blue]blue\m[]", "blue"),
        (r"\(zz", ""),
    ],
)
def test_escapes(troff, text):
    assert plain(troff) == text


@pytest.mark.parametrize("source", [".so man2/open.2\n", ".Dd May 1\n.Sh NAME\n"])
def test_references_and_mdoc_pages_are_empty(source):
    assert page_text(source) == ""
