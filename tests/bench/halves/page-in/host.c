/* A slot whose pages are made at the first touch, in one of several ways. */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host.h"
#include "lab.h"

#define SLOT_SIZE (LAB_PAGES * PAGE_SIZE)
#define BLOCK_SIZE (16 * PAGE_SIZE)

static struct {
    uint8_t *hva;
    enum source source;
    int uffd;
} lab;

static uint8_t contents[BLOCK_SIZE] __attribute__((aligned(4096))) = {1};

static void fault_serve(uint64_t address) {
    uint64_t size = lab.source == SOURCE_PAGE ? PAGE_SIZE : BLOCK_SIZE;
    uint64_t start = address & ~(size - 1);
    struct uffdio_copy copy = {.dst = start, .src = (uintptr_t)contents, .len = size};
    if (ioctl(lab.uffd, UFFDIO_COPY, &copy) < 0)
        host_stuck("it cannot supply a page");
}

static void *faults_serve(void *unused) {
    struct uffd_msg message;
    while (read(lab.uffd, &message, sizeof message) == sizeof message)
        fault_serve(message.arg.pagefault.address);
    return unused;
}

/* It lives as long as the process: it touches nothing but the slot. */
static void server_start(void) {
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, faults_serve, NULL))
        host_cannot("it gives the VMM no second thread");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void uffd_begin(void) {
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register missing = {.range = {(uintptr_t)lab.hva, SLOT_SIZE},
                                      .mode = UFFDIO_REGISTER_MODE_MISSING};
    lab.uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (lab.uffd < 0 || ioctl(lab.uffd, UFFDIO_API, &api) < 0 ||
        ioctl(lab.uffd, UFFDIO_REGISTER, &missing) < 0)
        host_cannot("its userfaultfd serves no faults of KVM for this user");
    server_start();
}

static void source_access(struct access *access) {
    lab.source = (enum source)access->data[0];
    if (lab.source != SOURCE_ANONYMOUS)
        uffd_begin();
}

/* Aligned as the blocks are; and no large pages, which would make the first touch of 511 pages none. */
static uint8_t *memory_map(void) {
    uint8_t *hva = mmap(NULL, SLOT_SIZE + BLOCK_SIZE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (hva == MAP_FAILED)
        host_cannot("there is no memory left for the lab");
    madvise(hva, SLOT_SIZE + BLOCK_SIZE, MADV_NOHUGEPAGE);
    return hva + (-(uintptr_t)hva & (BLOCK_SIZE - 1));
}

static void setup(void) {
    lab.hva = memory_map();
    struct kvm_userspace_memory_region region = {.slot = HOST_SLOT_FIRST,
                                                 .guest_phys_addr = LAB_GPA,
                                                 .memory_size = SLOT_SIZE,
                                                 .userspace_addr = (uintptr_t)lab.hva};
    host_vm(KVM_SET_USER_MEMORY_REGION, &region);
    host_claim_pio(LAB_SOURCE, 1, "source", source_access);
}

const struct host_half host_half = {.setup = setup};
