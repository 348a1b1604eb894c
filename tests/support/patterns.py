"""Regular expressions that make a backtracking engine explode, or that no engine takes."""

EVIL = [
    r"(a+)+$",
    r"(a|aa)+$",
    r"(a|a?)+$",
    r"(.*)*x",
    ".*" * 20 + "x",
    r"(a*)*b",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(x+x+)+y",
    r"(?:a?){200}a{200}!!",
    r"((a|b)*c)*d",
    r"(?:a|b|ab)*c" * 20,
    r"((((a*)*)*)*)*b",
    r"(?=(a+)+b)a",
    r"(?!(a|a)*b)a+c",
    r"(a|a)(a|a)" * 30 + "b",
    r"(?:(?:a{0,9}){0,9}){0,9}b",
]
