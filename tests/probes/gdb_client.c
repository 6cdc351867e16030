/*
 * What gdb would say to the stub, where there is no gdb: in the emulated machines.
 *
 *     gdb_client PACKET... -- VMM ARGUMENT...
 *
 * Starts the VMM with --gdb=SOCKET, sends the packets one after the other, and prints each with its answer. An
 * answer with O, which is text for a person, is passed over. After "c!" it sends c, and Ctrl-C as soon as the
 * guest has printed something. What the guest prints is shown nowhere.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define SOCKET "gdb.socket"
#define CONTINUE_AND_INTERRUPT "c!"

static int console; /* what the guest prints */

static void fail(const char *what) {
    perror(what);
    exit(2);
}

/* A file can be bound before anybody listens there: the VMM says when it waits. */
static pid_t vmm_start(char **arguments) {
    int ends[2], console_ends[2];
    char said[64];
    if (pipe(ends) < 0 || pipe(console_ends) < 0)
        fail("pipe");
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        dup2(console_ends[1], STDOUT_FILENO);
        execv(arguments[0], arguments);
        fail(arguments[0]);
    }
    close(ends[1]);
    close(console_ends[1]);
    console = console_ends[0];
    if (read(ends[0], said, sizeof said) <= 0)
        fail("the VMM does not wait for gdb");
    return child;
}

static FILE *stub_open(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
    int stub = socket(AF_UNIX, SOCK_STREAM, 0);
    if (stub < 0 || connect(stub, (struct sockaddr *)&address, sizeof address) < 0)
        fail(SOCKET);
    FILE *file = fdopen(stub, "r+");
    if (!file)
        fail(SOCKET);
    setvbuf(file, NULL, _IONBF, 0);
    return file;
}

static void packet_send(FILE *stub, const char *text) {
    uint8_t sum = 0;
    for (const char *c = text; *c; c++)
        sum = (uint8_t)(sum + (uint8_t)*c);
    fprintf(stub, "$%s#%02x", text, sum);
}

static void guest_interrupt(FILE *stub) {
    char printed[64];
    packet_send(stub, "c");
    if (read(console, printed, sizeof printed) <= 0)
        fail("the guest prints nothing");
    putc(3, stub);
}

/* False: the line is closed. */
static int answer_print(FILE *stub) {
    char text[8192];
    size_t length;
    int c;
    do {
        while ((c = getc(stub)) != '$' && c != EOF)
            ;
        for (length = 0; (c = getc(stub)) != '#' && c != EOF && length < sizeof text - 1;)
            text[length++] = (char)c;
        text[length] = '\0';
        (void)getc(stub), (void)getc(stub);
        putc('+', stub);
    } while (text[0] == 'O' && text[1] != 'K');
    printf(" %s\n", c == EOF ? "(gone)" : text);
    return c != EOF;
}

int main(int argc, char **argv) {
    int status;
    int packets = 1;
    while (packets < argc && strcmp(argv[packets], "--") != 0)
        packets++;
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    pid_t child = vmm_start(argv + packets + 1);
    FILE *stub = stub_open();
    for (int i = 1; i < packets; i++) {
        printf("%s", argv[i]);
        if (strcmp(argv[i], CONTINUE_AND_INTERRUPT) == 0)
            guest_interrupt(stub);
        else
            packet_send(stub, argv[i]);
        if (!answer_print(stub))
            break;
    }
    fclose(stub);
    fflush(stdout);
    if (waitpid(child, &status, 0) < 0)
        fail("waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
