//go:build upstream

// Our part of upstream's package: it writes down which connections upstream's proxy deletes. The
// rest of the package comes from upstream's module, by way of an overlay.
package conntrack

import (
	"fmt"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"portcullis.dev/integration/upstream/record"
)

// A cleanup is a table of connections, and who serves.
type cleanup struct {
	Test          string                   `json:"test"`
	Line          string                   `json:"line"`
	Service       *v1.Service              `json:"service"`
	EndpointSlice *discovery.EndpointSlice `json:"endpointSlice"`
	Flows         []flow                   `json:"flows"`
}

type flow struct {
	Protocol uint8 `json:"protocol"`
	// Where its first packet went to; null for an address of the node.
	Destination *string `json:"destination"`
	Port        uint16  `json:"port"`
	// Who answers: the same as the destination where nothing was translated.
	Answering     string `json:"answering"`
	AnsweringPort uint16 `json:"answeringPort"`
	Deleted       bool   `json:"deleted"`
}

func recordCleanup(
	t *testing.T, line int, service *v1.Service, slice *discovery.EndpointSlice,
	before, after []*netlink.ConntrackFlow,
) {
	one := cleanup{
		Test:          record.Test(t),
		Line:          fmt.Sprintf("cleanup_test.go:%d", line),
		Service:       service,
		EndpointSlice: slice,
	}
	for _, entry := range before {
		flow := flow{
			Protocol:      entry.Forward.Protocol,
			Port:          entry.Forward.DstPort,
			Answering:     entry.Reverse.SrcIP.String(),
			AnsweringPort: entry.Reverse.SrcPort,
			Deleted:       !slices.Contains(after, entry),
		}
		if entry.Forward.DstIP != nil {
			destination := entry.Forward.DstIP.String()
			flow.Destination = &destination
		}
		one.Flows = append(one.Flows, flow)
	}
	record.Write(t, one)
}
