"""The outer loop over knobs, from any number of processes, and the samplers that propose what is tried next."""

BUILTIN = {
    "tpe": "autopeft.search.tpe:TPE",
    "random": "autopeft.search.random:Random",
    "nsga2": "autopeft.search.nsga2:NSGA2",
    "gp": "autopeft.search.gp:GP",
}
