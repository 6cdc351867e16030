/* A guest with several cases: the word case=NAME on the command line chooses one. */
#pragma once

#include "guest.h"

struct guest_case {
    const char *name;
    void (*run)(void);
};

static inline void case_run(const struct guest_case *cases, size_t count) {
    char name[32];
    guest_parameter("case", name, sizeof name);
    for (size_t i = 0; i < count; i++) {
        if (strlen(name) == strlen(cases[i].name) && !memcmp(name, cases[i].name, strlen(name))) {
            cases[i].run();
            return;
        }
    }
    PANIC("there is no such case");
}

#define CASE_RUN(cases) case_run(cases, sizeof(cases) / sizeof *(cases))
