/* What the two halves of this test agree on. */
#pragma once

#define LAB_COMMAND 0x500      /* one byte: enum command */
#define LAB_MEMORY 0xd0000000  /* the host half's memory_event serves the page here ... */
#define LAB_MEMORY_SIZE 0x1000 /* ... and nothing behind it */
#define LAB_MEMORY_WORD 0x12345678

enum command {
    COMMAND_NOTHING,
    COMMAND_NULL_POINTER,
    COMMAND_DIVIDE,
    COMMAND_RECURSE,
    COMMAND_LOOP,
    COMMAND_LOOP_IN_END,
    COMMAND_TODO,
    COMMAND_CANNOT,
    COMMAND_MEMORY,
    COMMAND_STRINGS,
    COMMAND_WALK,
    COMMAND_MACHINE,
    COMMAND_STATISTICS,
};
