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

/* The number of another word, NAME=NUMBER; 0 if there is none. */
static inline uint64_t case_number(const char *name) {
    char text[24];
    uint64_t value = 0;
    guest_parameter(name, text, sizeof text);
    for (const char *digit = text; *digit >= '0' && *digit <= '9'; digit++)
        value = 10 * value + (uint64_t)(*digit - '0');
    return value;
}

#define CASE_RUN(cases) case_run(cases, sizeof(cases) / sizeof *(cases))
