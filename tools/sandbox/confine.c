/*
 * The sandbox in an emulated machine: run a command as a user without privileges, and end it, with
 * all that it has started, when it takes too long. There, the command would be root, and could write
 * to the trace by which the kernel is a witness of what it does, and to the port that the machine
 * answers by.
 *
 *     confine SECONDS RESULT COMMAND...
 *
 * RESULT is the one file that the command can write to. The status is the command's; as in
 * timeout(1), 124 if it took too long, and 125 if it was not started. tools/kvmlab/sandbox.py does
 * the same on a machine that is not emulated.
 */
#include <fcntl.h>
#include <glob.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { USER = 20000, TOO_LATE = 124, NOT_STARTED = 125, SIGNALLED = 128 };

static const struct {
    int resource;
    rlim_t most;
} limits[] = {
    {RLIMIT_NPROC, 48},       {RLIMIT_AS, 1 << 30},
    {RLIMIT_FSIZE, 64 << 20}, {RLIMIT_NOFILE, 512},
    {RLIMIT_CORE, 0},         {RLIMIT_MEMLOCK, RLIM_INFINITY}, /* VFIO pins the guest's memory */
};

/* What host halves of lessons use as root does, too. */
static void devices_open(void) {
    glob_t found = {0};
    glob("/dev/vfio/*", 0, NULL, &found);
    for (size_t i = 0; i < found.gl_pathc; i++)
        chmod(found.gl_pathv[i], 0666);
    globfree(&found);
    chmod("/dev/kvm", 0666);
    chmod("/dev/kmsg", 0444);
}

static void setting_write(const char *path, char digit) {
    int file = open(path, O_WRONLY | O_CLOEXEC);
    (void)!write(file, &digit, 1);
    close(file);
}

static int result_make(const char *path) {
    int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    return file < 0 || fchmod(file, 0666) || close(file) || chmod(".", 0755);
}

__attribute__((noreturn)) static void become(char **command) {
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (setrlimit((__rlimit_resource_t)limits[i].resource,
                      &(struct rlimit){limits[i].most, limits[i].most}))
            _exit(NOT_STARTED);
    if (!setgroups(0, NULL) && !setgid(USER) && !setuid(USER) &&
        !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        execv(command[0], command);
    perror("the command cannot be started");
    _exit(NOT_STARTED);
}

static int follow(pid_t child, int milliseconds) {
    struct pollfd ended = {.fd = (int)syscall(SYS_pidfd_open, child, 0), .events = POLLIN};
    int status;
    if (poll(&ended, 1, milliseconds) == 0) {
        kill(-1, SIGKILL); /* all but the first process and this one */
        return TOO_LATE;
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : SIGNALLED + WTERMSIG(status);
}

int main(int argc, char **argv) {
    if (argc < 4 || result_make(argv[2]))
        return NOT_STARTED;
    devices_open();
    setting_write("/proc/sys/vm/unprivileged_userfaultfd", '1');
    setting_write("/proc/sys/kernel/dmesg_restrict", '0');
    pid_t child = fork();
    if (child == 0)
        become(argv + 3);
    return child < 0 ? NOT_STARTED : follow(child, 1000 * atoi(argv[1]));
}
