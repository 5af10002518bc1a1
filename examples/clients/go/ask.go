// Asks a Hocket router: ask ROUTER MODEL ROW..., where a row is numbers like 0.5,-1,2.
// ROUTER is host:port or dns:///name:port. HOCKET_CA_FILE turns TLS on.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/health" // healthCheckConfig has no effect without it
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	hocket "ask/hocket/v1"
)

// Routers take turns while they say that they serve; a call that has got nothing yet is tried again.
const serviceConfig = `{
	"loadBalancingConfig": [{"round_robin": {}}],
	"healthCheckConfig": {"serviceName": "hocket.v1.RouterService"},
	"methodConfig": [{
		"name": [{"service": "hocket.v1.RouterService"}],
		"retryPolicy": {
			"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
			"retryableStatusCodes": ["UNAVAILABLE"]
		}
	}],
	"retryThrottling": {"maxTokens": 512, "tokenRatio": 0.1}
}`

// toTensor gives rows of numbers as a tensor: float32, little-endian, row-major.
func toTensor(rows [][]float32) *hocket.Tensor {
	var contents bytes.Buffer
	for _, row := range rows {
		binary.Write(&contents, binary.LittleEndian, row) // a Buffer takes everything
	}
	shape := []int64{int64(len(rows)), int64(len(rows[0]))}
	return &hocket.Tensor{Datatype: "FP32", Shape: shape, Contents: contents.Bytes()}
}

// toRows gives a tensor as rows of numbers.
func toRows(tensor *hocket.Tensor) ([][]float32, error) {
	contents := bytes.NewReader(tensor.Contents)
	rows := make([][]float32, tensor.Shape[0])
	for index := range rows {
		rows[index] = make([]float32, tensor.Shape[1])
		if err := binary.Read(contents, binary.LittleEndian, rows[index]); err != nil {
			return nil, err
		}
	}
	return rows, nil
}

// describe gives status, stable reason and message of a failed call. Branch on the reason, never on the message.
func describe(err error) string {
	failure, reason := status.Convert(err), "-"
	for _, detail := range failure.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			reason = info.Reason
		}
	}
	return fmt.Sprintf("%s %s: %s", code.Code(failure.Code()), reason, failure.Message())
}

// show gives a value as JSON.
func show(value interface{}) string {
	text, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// within gives the context of one call. Every call needs a deadline.
func within(seconds time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), seconds*time.Second)
}

func connect(address string) (*grpc.ClientConn, error) {
	security := grpc.WithInsecure()
	if file := os.Getenv("HOCKET_CA_FILE"); file != "" {
		tls, err := credentials.NewClientTLSFromFile(file, "")
		if err != nil {
			return nil, err
		}
		security = grpc.WithTransportCredentials(tls)
	}
	limit := grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16 << 20))
	return grpc.Dial(address, security, limit, grpc.WithDefaultServiceConfig(serviceConfig))
}

func checkHealth(health grpc_health_v1.HealthClient) error {
	ctx, cancel := within(5)
	defer cancel()
	answer, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "hocket.v1.RouterService"})
	if err == nil {
		fmt.Printf("health: %s\n", answer.Status)
	}
	return err
}

func listMixtures(router hocket.RouterServiceClient) error {
	for token := ""; ; {
		ctx, cancel := within(5)
		page, err := router.ListMixtures(ctx, &hocket.ListMixturesRequest{PageToken: token})
		cancel()
		if err != nil {
			return err
		}
		for _, mixture := range page.Mixtures {
			fmt.Printf("model: %s, experts: %d\n", mixture.Name, mixture.ExpertCount)
		}
		if token = page.NextPageToken; token == "" {
			return nil
		}
	}
}

func predict(router hocket.RouterServiceClient, model string, rows [][]float32) error {
	ctx, cancel := within(10)
	defer cancel()
	request := &hocket.PredictRequest{Model: model, Input: toTensor(rows), Partials: true}
	stream, err := router.Predict(ctx, request)
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		switch event := response.Event.(type) {
		case *hocket.PredictResponse_Plan:
			if len(event.Plan.Labels) > 0 {
				fmt.Printf("labels: %s\n", strings.Join(event.Plan.Labels, ", "))
			}
			for _, expert := range event.Plan.Experts {
				fmt.Printf("plan: %s rows %s weights %s\n", expert.Expert, show(expert.Rows), show(expert.Weights))
			}
		case *hocket.PredictResponse_Partial:
			value, err := toRows(event.Partial.Value)
			if err != nil {
				return err
			}
			fmt.Printf("partial %d: %s coverage %s\n", event.Partial.Sequence, show(value), show(event.Partial.Coverage))
		case *hocket.PredictResponse_Final:
			combination := event.Final.Combination
			value, err := toRows(combination.Value)
			if err != nil {
				return err
			}
			fmt.Printf("final: %s coverage %s %s\n", show(value), show(combination.Coverage), event.Final.Finish.Reason)
		}
	}
}

func ask(address, model string, texts []string) error {
	var rows [][]float32
	for _, text := range texts {
		var row []float32
		for _, number := range strings.Split(text, ",") {
			value, err := strconv.ParseFloat(number, 32)
			if err != nil {
				return err
			}
			row = append(row, float32(value))
		}
		rows = append(rows, row)
	}
	connection, err := connect(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	if err := checkHealth(grpc_health_v1.NewHealthClient(connection)); err != nil {
		return err
	}
	router := hocket.NewRouterServiceClient(connection)
	if err := listMixtures(router); err != nil {
		return err
	}
	return predict(router, model, rows)
}

func main() {
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "ask ROUTER MODEL ROW...")
		os.Exit(2)
	}
	if err := ask(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, describe(err))
		os.Exit(1)
	}
}
