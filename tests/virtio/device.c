/*
 * The VMM's virtio console without a VMM: commands on standard input, a line each, do what a guest does. Whatever
 * happens is a line of JSON on standard output, and the last line for each command is its answer.
 *
 *   device MEMORY_FD MEMORY_SIZE     guest memory is a file, which the caller has mapped too
 *
 *   read OFFSET SIZE            a register; the answer is its value, or null if nobody claims it
 *   write OFFSET SIZE VALUE
 *   doorbell VALUE              a write that an ioeventfd waits for
 *   protect GPA SIZE BITS       which accesses (PROT_*) of the device to this memory do not end it
 *   change GPA VALUE ACCESSES   64 bits of memory that change when the device has accessed their page so many times
 *   input HEX                   bytes on standard input; the answer says whether all of them were taken
 *   input_ends
 *   resize COLUMNS ROWS         of the terminal
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "surroundings.h"

#define ARGUMENTS 3

static void event_show(const char *json) { puts(json); }

static void output_show(const void *bytes, size_t size) {
    printf("{\"kind\":\"output\",\"bytes\":\"");
    for (size_t i = 0; i < size; i++)
        printf("%02x", ((const uint8_t *)bytes)[i]);
    puts("\"}");
}

static void line_show(bool is_high) { printf("{\"kind\":\"line\",\"is_high\":%d}\n", is_high); }

struct listeners listeners = {event_show, output_show, line_show};

static void answer(bool is_there, uint64_t value) {
    if (is_there)
        printf("{\"kind\":\"answer\",\"value\":%" PRIu64 "}\n", value);
    else
        puts("{\"kind\":\"answer\",\"value\":null}");
    fflush(stdout);
}

static void access_do(const uint64_t *argument, bool is_write) {
    uint64_t value = argument[2];
    bool is_claimed =
        register_access((uint32_t)argument[0], (uint32_t)argument[1], is_write, &value);
    answer(is_claimed, value);
}

static void read_do(const uint64_t *argument) { access_do(argument, false); }
static void write_do(const uint64_t *argument) { access_do(argument, true); }
static void doorbell_do(const uint64_t *argument) {
    answer(doorbell_ring((uint32_t)argument[0]), 0);
}
static void protect_do(const uint64_t *argument) {
    memory_protect(argument[0], argument[1], (int)argument[2]);
    answer(true, 0);
}
static void change_do(const uint64_t *argument) {
    memory_change_after(argument[0], argument[1], (unsigned)argument[2]);
    answer(true, 0);
}
static void resize_do(const uint64_t *argument) {
    virtio_console_resize((uint16_t)argument[0], (uint16_t)argument[1]);
    answer(true, 0);
}
static void input_ends_do(const uint64_t *argument) {
    (void)argument;
    input_ends();
    answer(true, 0);
}

static void input_do(const char *hex) {
    size_t size = strlen(hex) / 2;
    uint8_t *bytes = malloc(size);
    for (size_t i = 0; i < size; i++)
        sscanf(hex + 2 * i, "%2hhx", &bytes[i]);
    answer(true, input_arrives(bytes, size));
    free(bytes);
}

static const struct command {
    const char *name;
    void (*execute)(const uint64_t *argument);
} commands[] = {
    {"read", read_do},
    {"write", write_do},
    {"doorbell", doorbell_do},
    {"protect", protect_do},
    {"change", change_do},
    {"resize", resize_do},
    {"input_ends", input_ends_do},
};

static void command_do(char *line) {
    uint64_t argument[ARGUMENTS] = {0};
    const char *name = strtok(line, " \n");
    if (!strcmp(name, "input")) {
        input_do(strtok(NULL, " \n"));
        return;
    }
    for (unsigned i = 0; i < ARGUMENTS; i++) {
        const char *word = strtok(NULL, " \n");
        argument[i] = word ? strtoull(word, NULL, 0) : 0;
    }
    for (unsigned i = 0; i < LENGTH(commands); i++)
        if (!strcmp(name, commands[i].name))
            commands[i].execute(argument);
}

int main(int argc, char **argv) {
    FILE *asked = fdopen(fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3), "r");
    char *line = NULL;
    size_t room = 0;
    if (argc != 3)
        return STATUS_USAGE;
    memory_create(atoi(argv[1]), strtoull(argv[2], NULL, 0));
    input_create();
    virtio_console_create();
    answer(true, 0);
    while (getline(&line, &room, asked) > 0)
        command_do(line);
    free(line);
    return STATUS_OK;
}
