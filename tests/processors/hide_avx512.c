/* Runs a program as on a processor without AVX-512, VNNI and AMX; with HIDE_AS_AMD=1 as on an AMD EPYC of Zen 2.

   Libraries choose their kernels by the instruction CPUID. On Linux for x86-64, processors that can make CPUID fault
   let a process answer it itself: this library, preloaded, executes the instruction, clears the bits, and goes on.

       cc -O2 -shared -fPIC -o hide_avx512.so hide_avx512.c
       LD_PRELOAD=./hide_avx512.so python ...

   As an AMD, CPUID describes name, instructions, caches and cores in the leaves that AMD uses (AMD64 Architecture
   Programmer's Manual, volume 3, appendix E), with the values of an EPYC 7702 and the number of cores of this machine.
   Kernels are blocked by the size of caches: an AMD that describes none gets kernels that no real one gets.

   The program ends with status 77 where the processor or the kernel cannot do this. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define NOT_POSSIBLE 77
#define ZEN_2 0x00830f10 /* family 17h, model 31h */
#define LAST_LEAF 0x10
#define LAST_EXTENDED_LEAF 0x8000001e

typedef struct {
  uint32_t a, b, c, d;
} Answer;

static int as_amd;
static uint32_t cores;

/* What an EPYC 7702 answers, where the machine is not asked. */
static const struct {
  uint32_t leaf, part;
  Answer answer;
} EPYC[] = {
    {0x0, 0, {LAST_LEAF, 0x68747541, 0x444d4163, 0x69746e65}}, /* "AuthenticAMD" */
    {0x80000000, 0, {LAST_EXTENDED_LEAF, 0x68747541, 0x444d4163, 0x69746e65}},
    {0x80000002, 0, {0x20444d41, 0x43595045, 0x30373720, 0x34362032}}, /* "AMD EPYC 7702 64-Core Processor" */
    {0x80000003, 0, {0x726f432d, 0x72502065, 0x7365636f, 0x20726f73}},
    {0x80000004, 0, {0x20202020, 0x20202020, 0x20202020, 0x00202020}},
    {0x80000005, 0, {0xff40ff40, 0xff40ff40, 0x20080140, 0x20080140}}, /* level 1: 32 KiB, 8 ways, lines of 64 bytes */
    {0x80000006, 0, {0x48006400, 0x68006400, 0x02006140, 0x08009140}}, /* level 2: 512 KiB; level 3: 256 MiB in all */
    {0x8000001d, 0, {0x00000121, 0x01c0003f, 0x0000003f, 0}},          /* level 1, data: one thread's */
    {0x8000001d, 1, {0x00000122, 0x01c0003f, 0x0000003f, 0}},          /* level 1, instructions */
    {0x8000001d, 2, {0x00000143, 0x01c0003f, 0x000003ff, 2}},          /* level 2 */
    {0x8000001d, 3, {0x0000c163, 0x03c0003f, 0x00003fff, 1}},          /* level 3: 16 MiB that four threads share */
};

static long let_cpuid_run(int run) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, run); }

static Answer ask(uint32_t leaf, uint32_t part) {
  Answer r;
  let_cpuid_run(1);
  __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(part));
  let_cpuid_run(0);
  return r;
}

static Answer answer_as_avx2(uint32_t leaf, uint32_t part) {
  Answer r = ask(leaf, part);
  if (leaf == 7 && part == 0) {
    r.b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31); /* AVX-512 F to VL */
    r.c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);                                    /* VBMI, VNNI, ... */
    r.d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);               /* FP16, AMX */
  } else if ((leaf == 7 && part == 1) || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) { /* AVX-VNNI, tiles, AVX10 */
    r = (Answer){0};
  }
  return r;
}

static Answer answer_as_amd(uint32_t leaf, uint32_t part) {
  Answer r = answer_as_avx2(leaf, part);
  for (size_t i = 0; i < sizeof EPYC / sizeof *EPYC; i++)
    if (EPYC[i].leaf == leaf && (EPYC[i].part == part || leaf != 0x8000001d)) return EPYC[i].answer;
  switch (leaf) { /* of the machine's own features, those that Zen 2 has too */
  case 0x1:
    return (Answer){ZEN_2, r.b, r.c & 0xfed8320b, r.d & 0x178bfbff};
  case 0x7:
    return part == 0 ? (Answer){0, r.b & 0x219c91a9, r.c & 0x00400004, 0} : (Answer){0};
  case 0x80000001:
    return (Answer){ZEN_2, 0x40000000, r.c & 0x75c237ff, r.d & 0x2fd3fbff};
  case 0x80000008:
    return (Answer){r.a, 0, 0x7000 | (cores - 1), 0};
  case 0x8000001e: { /* the core that runs this, of one thread, on the only node */
    uint32_t core = ask(1, 0).b >> 24;
    return (Answer){core, core, 0, 0};
  }
  case 0x2: /* Intel's descriptions of caches and of monitoring */
  case 0x4:
  case 0x9:
  case 0xa:
    return (Answer){0};
  }
  int none = (leaf > LAST_LEAF && leaf < 0x40000000) || leaf > 0x80000008;
  return none ? (Answer){0} : r;
}

static void answer(int signal_number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
  (void)info;
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) { /* a true fault: let it happen again, unhandled */
    signal(signal_number, SIG_DFL);
    return;
  }
  uint32_t leaf = registers[REG_RAX], part = registers[REG_RCX];
  Answer r = as_amd ? answer_as_amd(leaf, part) : answer_as_avx2(leaf, part);
  registers[REG_RAX] = r.a, registers[REG_RBX] = r.b, registers[REG_RCX] = r.c, registers[REG_RDX] = r.d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action;
  as_amd = getenv("HIDE_AS_AMD") != NULL;
  cores = sysconf(_SC_NPROCESSORS_CONF);
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, NULL);
  if (let_cpuid_run(0) != 0) {
    fputs("this processor or kernel cannot hide instructions\n", stderr);
    _exit(NOT_POSSIBLE);
  }
}
