/*
 * Run commands and say what each has cost:
 *
 *   measure time ROUNDS SEED
 *   measure memory
 *
 * The commands stand on standard input, a line for each, with tabs between their words. time runs each of them in
 * each round, in an order that SEED decides, and prints a line for each: which of them, nanoseconds to its first
 * byte and to its end, nanoseconds of CPU time to its first byte and to its end, its status. The CPU time is what
 * the kernel counts: under -icount, where a nanosecond is an instruction, it is a number of instructions.
 *
 * memory prints the KiB that each has in memory at its first byte, and how many of them are not pages of its file:
 * in all but its largest mapping, which is the guest's memory.
 *
 * What a command prints goes into a pipe, or, of one whose first word is a dash, nowhere.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { COMMANDS_MAX = 32, WORDS_MAX = 40, TOO_LONG = 60 /* seconds */ };

static char *commands[COMMANDS_MAX][WORDS_MAX + 1];
static unsigned command_count;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static pid_t child; /* that runs now */

static void on_late(int number) {
    (void)number;
    kill(child, SIGKILL);
}

/* Start it; the end of the pipe that its output can be read from. */
static int start(char **command) {
    int ends[2];
    bool is_quiet = !strcmp(command[0], "-");
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    if (pipe2(ends, O_CLOEXEC) < 0)
        fail("pipe");
    if (!is_quiet)
        posix_spawn_file_actions_adddup2(&files, ends[1], STDOUT_FILENO);
    errno = posix_spawn(&child, command[is_quiet], &files, NULL, command + is_quiet, environ);
    if (errno != 0)
        fail(command[is_quiet]);
    posix_spawn_file_actions_destroy(&files);
    close(ends[1]);
    alarm(TOO_LONG);
    return ends[0];
}

/* /proc/PID/schedstat (Documentation/scheduler/sched-stats.rst): nanoseconds on the CPU, and two more numbers. */
static uint64_t cpu_ns(void) {
    char path[40];
    uint64_t ns = 0;
    snprintf(path, sizeof path, "/proc/%d/schedstat", child);
    FILE *file = fopen(path, "r");
    if (!file || fscanf(file, "%" SCNu64, &ns) != 1)
        ns = 0;
    if (file)
        fclose(file);
    return ns;
}

static void drain(int output) {
    char bytes[4096];
    while (read(output, bytes, sizeof bytes) > 0)
        ;
    close(output);
}

static void time_once(unsigned which) {
    int status;
    char byte;
    struct rusage usage;
    uint64_t began = clock_ns();
    int output = start(commands[which]);
    bool has_byte = read(output, &byte, 1) == 1;
    uint64_t first = clock_ns() - began;
    uint64_t first_cpu = has_byte ? cpu_ns() : 0;
    drain(output);
    wait4(child, &status, 0, &usage);
    uint64_t cpu = (uint64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000u +
                   (uint64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000u;
    printf("%u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %d\n", which, first,
           clock_ns() - began, first_cpu, cpu, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

static void memory_once(unsigned which) {
    char byte;
    char path[40];
    char line[256];
    bool is_largest = false;
    unsigned long size = 0;
    unsigned long kib;
    unsigned long largest = 0;
    unsigned long rss = 0;
    unsigned long anonymous = 0;
    unsigned long of_largest[2] = {0};
    int output = start(commands[which]);
    if (read(output, &byte, 1) != 1)
        fail("a command that prints nothing");
    kill(child, SIGSTOP);
    waitpid(child, NULL, WUNTRACED);
    snprintf(path, sizeof path, "/proc/%d/smaps", child);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "Size: %lu", &size) == 1) {
            is_largest = size > largest;
            largest = is_largest ? size : largest;
        } else if (sscanf(line, "Rss: %lu", &kib) == 1) {
            rss += kib;
            of_largest[0] = is_largest ? kib : of_largest[0];
        } else if (sscanf(line, "Anonymous: %lu", &kib) == 1) {
            anonymous += kib;
            of_largest[1] = is_largest ? kib : of_largest[1];
        }
    }
    if (file)
        fclose(file);
    kill(child, SIGKILL);
    drain(output);
    waitpid(child, NULL, 0);
    printf("%u %lu %lu\n", which, rss - of_largest[0], anonymous - of_largest[1]);
}

static void time_all(unsigned rounds, unsigned seed) {
    unsigned order[COMMANDS_MAX] = {0};
    srand(seed);
    for (unsigned round = 0; round < rounds; round++) {
        for (unsigned i = 0; i < command_count; i++) {
            unsigned at = (unsigned)rand() % (i + 1);
            order[i] = order[at];
            order[at] = i;
        }
        for (unsigned i = 0; i < command_count; i++)
            time_once(order[i]);
    }
}

static void commands_read(void) {
    static char text[8192];
    size_t size = fread(text, 1, sizeof text - 1, stdin);
    char *rest_of_text = text;
    char *line;
    text[size] = '\0';
    while (command_count < COMMANDS_MAX && (line = strsep(&rest_of_text, "\n")) && *line) {
        for (unsigned i = 0; i < WORDS_MAX && line; i++)
            commands[command_count][i] = strsep(&line, "\t");
        command_count++;
    }
}

int main(int argc, char **argv) {
    commands_read();
    signal(SIGALRM, on_late);
    /* On one CPU, ahead of the command as soon as its first byte is there. Whoever may not is not. */
    sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK,
                       &(struct sched_param){.sched_priority = 1});
    if (argc == 2 && !strcmp(argv[1], "memory"))
        for (unsigned i = 0; i < command_count; i++)
            memory_once(i);
    else if (argc == 4)
        time_all((unsigned)atoi(argv[2]), (unsigned)atoi(argv[3]));
    return 0;
}
