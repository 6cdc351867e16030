/*
 * What happens beside the vCPU: a second thread that waits for file descriptors, while the vCPU's sleeps in
 * KVM_RUN. There is one lock. The vCPU's thread gives it away only where it sleeps, and so whoever has it is
 * alone with the machine, the record and the host half: no other code of the VMM knows of threads.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "vmm.h"

#define SOURCES_MAX 8

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct io_source {
    void (*ready)(void *context);
    void *context;
    int fd;
    bool enabled;
    bool is_input; /* comes from outside: it may come while the guest sleeps */
} sources[SOURCES_MAX];
static unsigned source_count;

static int changed = -1; /* an eventfd: the sources are not those that the thread waits for */

void io_lock(void) { pthread_mutex_lock(&lock); }
void io_unlock(void) { pthread_mutex_unlock(&lock); }

/* Of the sources that are enabled; returns how many there are. */
static nfds_t sources_list(struct pollfd *list, struct io_source **listed) {
    nfds_t count = 0;
    for (unsigned i = 0; i < source_count; i++) {
        if (!sources[i].enabled)
            continue;
        listed[count] = &sources[i];
        list[count++] = (struct pollfd){.fd = sources[i].fd, .events = POLLIN};
    }
    return count;
}

/* Those that can be read now, under the lock: what the other thread has read must not be waited for. */
static void sources_serve(void) {
    struct pollfd list[SOURCES_MAX];
    struct io_source *listed[SOURCES_MAX];
    nfds_t count = sources_list(list, listed);
    if (poll(list, count, 0) <= 0)
        return;
    for (nfds_t i = 0; i < count; i++)
        if (list[i].revents && listed[i]->enabled) /* one handler may disable another source */
            listed[i]->ready(listed[i]->context);
}

static void eventfd_clear(int fd) {
    uint64_t count;
    (void)!read(fd, &count, sizeof count);
}

static void *io_thread(void *unused) {
    struct pollfd list[SOURCES_MAX + 1];
    struct io_source *listed[SOURCES_MAX];
    io_lock();
    for (;;) {
        nfds_t count = sources_list(list, listed);
        list[count] = (struct pollfd){.fd = changed, .events = POLLIN};
        io_unlock();
        (void)poll(list, count + 1, -1);
        io_lock();
        eventfd_clear(changed);
        sources_serve();
    }
    return unused;
}

/* Signals are for the vCPU's thread: they must get it out of KVM_RUN. */
static void thread_start(void) {
    sigset_t all, before;
    pthread_t thread;
    changed = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (changed < 0)
        die(STATUS_HOST, "no eventfd for the thread for input: %s", strerror(errno));
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread, NULL, io_thread, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        die(STATUS_HOST, "cannot start the thread for input: %s", strerror(error));
    pthread_detach(thread);
}

static void sources_changed(void) {
    uint64_t one = 1;
    (void)!write(changed, &one, sizeof one);
}

struct io_source *io_watch(int fd, bool is_input, void (*ready)(void *context), void *context) {
    if (source_count == SOURCES_MAX)
        die(STATUS_HOST, "one source of input is too many: there are %u", source_count);
    struct io_source *source = &sources[source_count++];
    *source = (struct io_source){
        .fd = fd, .ready = ready, .context = context, .enabled = true, .is_input = is_input};
    if (changed < 0)
        thread_start();
    sources_changed();
    return source;
}

void io_enable(struct io_source *source, bool enabled) {
    if (source->enabled == enabled)
        return;
    source->enabled = enabled;
    sources_changed();
}

/* ---- doorbells: KVM_IOEVENTFD ---- */

static struct doorbell {
    void (*ready)(void *context);
    void *context;
    int fd;
} doorbells[SOURCES_MAX];

static void doorbell_ready(void *context) {
    const struct doorbell *doorbell = context;
    uint64_t rings;
    if (read(doorbell->fd, &rings, sizeof rings) == sizeof rings)
        doorbell->ready(doorbell->context);
}

void io_doorbell(gpa_t gpa, uint32_t value, void (*ready)(void *context), void *context) {
    static unsigned count;
    struct kvm_ioeventfd request = {
        .datamatch = value,
        .addr = gpa,
        .len = sizeof value,
        .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
        .flags = KVM_IOEVENTFD_FLAG_DATAMATCH,
    };
    if (request.fd < 0 || count == LENGTH(doorbells))
        die(STATUS_HOST, "no eventfd for the guest's notifications: %s", strerror(errno));
    doorbells[count] = (struct doorbell){ready, context, request.fd};
    host_vm(KVM_IOEVENTFD, &request);
    io_watch(request.fd, false, doorbell_ready, &doorbells[count++]);
}

/* ---- the halted vCPU ---- */

bool io_serve(void) {
    sources_serve();
    for (unsigned i = 0; i < source_count; i++)
        if (sources[i].enabled && sources[i].is_input)
            return true;
    return false;
}
