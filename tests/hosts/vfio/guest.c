/* Drive edu: read its registers, let it interrupt in each of three ways, move data by DMA where it may and where it
 * must not. With beyond=1 on the command line, it is told to move more than its buffer has. */
#include "guest.h"
#include "apic.h"
#include "lab.h"

MACHINE(.memory_mib = 16, .irqchip = MACHINE_IRQCHIP_KERNEL, .devices = MACHINE_DEVICE_COM1);

#define FIRST_CAUSE 0x11u
#define SECOND_CAUSE 0x22u
#define SPURIOUS 0xff

static volatile unsigned taken;
static unsigned calls_until_acknowledged;

static uint32_t edu_read(unsigned offset) { return mmio_read32(LAB_BAR + offset); }
static void edu_write(unsigned offset, uint32_t value) { mmio_write32(LAB_BAR + offset, value); }

static bool on_interrupt(struct trap_frame *frame) {
    (void)frame;
    uint32_t cause = edu_read(EDU_INTERRUPT_STATUS);
    out32(LAB_CAUSE, cause);
    if (++taken >= calls_until_acknowledged)
        edu_write(EDU_INTERRUPT_ACKNOWLEDGE, cause);
    lapic_eoi();
    return true;
}

static bool on_spurious(struct trap_frame *frame) {
    (void)frame;
    return true;
}

/* Wait for so many interrupts in all. */
static void interrupts_wait(unsigned count) {
    sti();
    while (taken < count)
        pause();
    cli();
}

static void interrupts_setup(void) {
    trap_handle(LAB_MSI_VECTOR, on_interrupt);
    trap_handle(LAB_LINE_VECTOR, on_interrupt);
    trap_handle(SPURIOUS, on_spurious);
    lapic_write(LAPIC_SVR, LAPIC_SVR_ENABLE | SPURIOUS);
    ioapic_write(IOAPIC_REDIRECTION(LAB_LINE_PIN) + 1, 0);
    ioapic_write(IOAPIC_REDIRECTION(LAB_LINE_PIN), LAB_LINE_VECTOR | (uint32_t)IOAPIC_LEVEL);
}

static void registers_try(void) {
    unsigned wrong = 0;
    out8(LAB_STAGE, STAGE_READ);
    for (unsigned i = 0; i < LAB_READS; i++)
        wrong += (edu_read(EDU_ID) & 0xffff) != 0x00ed;
    out8(LAB_STAGE, STAGE_HAS_READ);
    out32(LAB_WRONG, wrong);
    edu_write(EDU_LIVENESS, (uint32_t)guest_seed());
    out32(LAB_LIVENESS, edu_read(EDU_LIVENESS));
}

/* A message interrupts once for each raise. A line interrupts again, until what it is about is acknowledged. */
static void interrupts_try(void) {
    out8(LAB_INTERRUPT, FORM_MSI);
    calls_until_acknowledged = 0;
    edu_write(EDU_INTERRUPT_RAISE, FIRST_CAUSE);
    interrupts_wait(1);
    edu_write(EDU_INTERRUPT_RAISE, SECOND_CAUSE);
    interrupts_wait(2);
    out8(LAB_INTERRUPT, FORM_LINE);
    calls_until_acknowledged = 5;
    edu_write(EDU_INTERRUPT_RAISE, FIRST_CAUSE | SECOND_CAUSE);
    interrupts_wait(5);
    out8(LAB_INTERRUPT, FORM_BY_HAND);
    edu_write(EDU_INTERRUPT_RAISE, FIRST_CAUSE);
    out8(LAB_STAGE, STAGE_BY_HAND);
    edu_write(EDU_INTERRUPT_ACKNOWLEDGE, FIRST_CAUSE);
    out8(LAB_STAGE, STAGE_ACKNOWLEDGED);
}

static void dma(uint32_t source, uint32_t destination, uint32_t direction, uint32_t count) {
    edu_write(EDU_DMA_SOURCE, source);
    edu_write(EDU_DMA_DESTINATION, destination);
    edu_write(EDU_DMA_COUNT, count);
    edu_write(EDU_DMA_COMMAND, EDU_DMA_START | direction);
    while (edu_read(EDU_DMA_COMMAND) & EDU_DMA_START)
        pause();
}

static void dma_to(uint32_t iova, enum stage then) {
    dma(EDU_BUFFER, iova, EDU_DMA_TO_RAM, LAB_BYTES);
    out8(LAB_STAGE, (uint8_t)then);
}

static void memory_fill(void) {
    struct random random = random_stream(guest_seed(), 1);
    uint8_t *source = (uint8_t *)(uint64_t)LAB_SOURCE;
    for (unsigned i = 0; i < LAB_BYTES; i++)
        source[i] = (uint8_t)random_next(&random);
    memset((void *)(uint64_t)LAB_DESTINATION, LAB_UNTOUCHED, PAGE_SIZE);
    memset((void *)(uint64_t)LAB_VICTIM, LAB_UNTOUCHED, PAGE_SIZE);
}

static void dma_try(void) {
    memory_fill();
    dma_to(LAB_SOURCE_IOVA, STAGE_READ_ONLY);
    dma(LAB_SOURCE_IOVA, EDU_BUFFER, 0, LAB_BYTES);
    dma_to(LAB_DESTINATION_IOVA, STAGE_MOVED);
    memset((void *)(uint64_t)LAB_SOURCE, LAB_UNTOUCHED, LAB_BYTES);
    memset((void *)(uint64_t)LAB_DESTINATION, LAB_UNTOUCHED, LAB_BYTES);
    dma_to(LAB_SOURCE_IOVA, STAGE_CACHED);
    out8(LAB_STAGE, STAGE_UNMAP);
    dma_to(LAB_DESTINATION_IOVA, STAGE_UNMAPPED);
    dma_to(LAB_VICTIM, STAGE_NEVER_MAPPED);
}

void guest_main(void) {
    char word[2];
    if (guest_parameter("beyond", word, sizeof word))
        dma(EDU_BUFFER, LAB_DESTINATION_IOVA, EDU_DMA_TO_RAM, EDU_BUFFER_SIZE + 1);
    interrupts_setup();
    registers_try();
    interrupts_try();
    dma_try();
    guest_exit(0);
}
